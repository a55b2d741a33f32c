"""Does a keep hold at the next depth? First form: paired seeds against the study's baseline, an interval."""

from __future__ import annotations

import itertools

from harness.records import Trial, TrialState, seed_of, trial_id
from harness.stats import paired_interval
from harness.view import StudyView

SPLIT = "audit"  # a promotion is a claim: it is read where nothing was chosen


def expected_runs(view: StudyView) -> list[tuple[int, str]]:
    """(rung, candidate) of every training that promotion wants or, on deeper rungs, will want if candidates gain.

    Who will climb is not known: the baseline stands for them. A rung's source is one of its trainings.
    """
    due: list[tuple[int, str]] = []
    climbing = 0
    wanted = promotion_runs(view)
    for rung in range(1, len(view.space.rungs)):
        runs = [(c, s) for c, r, seeds in wanted if r == rung for s in seeds]
        source = [view.source] if view.source else []
        due += [(rung, c) for c, s in runs if not _is_over(view, c, rung, s)]
        due += [(rung, c) for c in source if runs and not _is_over(view, c, rung, seed_of(rung, 0))]
        if not runs and climbing and not view.space.rungs[rung].review:
            some = [view.baseline] * view.space.rungs[rung].seeds * (climbing + 1)
            due += [(rung, c) for c in some + source]
        entering = len({c for c, _ in runs} - {view.baseline}) or climbing
        climbing = min(view.space.rungs[rung].promote, entering)
    return due


def _is_over(view: StudyView, candidate: str, rung: int, seed: int) -> bool:
    trial = view.trials.get(trial_id(candidate, rung, seed))
    return trial is not None and trial.over


def entrants(view: StudyView, rung: int) -> list[str]:
    """Candidates that climb to `rung` now: those on their way, and the latest keeps within the rung's quota; the best,
    once all are decided, where each is measured against the baseline.

    Above the second rung only those climb that gained on the rung below; a refusal of a person's bars the way.
    """
    decided = {e["candidate"] for e in view.promoted if e["rung"] == rung}
    if rung == 1:
        ready = view.incumbents[:0:-1]
        if view.space.decision.against == "baseline":  # keeps that do not build on each other: the best climb
            ready = [] if view.open else sorted(ready, key=lambda c: -view.candidates[c].last["delta"])
    else:
        gained = [e for e in view.promoted if e["rung"] == rung - 1 and (e["delta"] or 0) > 0]
        ready = [e["candidate"] for e in sorted(gained, key=lambda e: -e["delta"])]
    if view.space.rungs[rung].review:
        ready = [c for c in ready if view.reviews.get(c, {}).get("action") == "accept"]
    ready = [c for c in ready if view.reviews.get(c, {}).get("action") != "reject"]
    ready = [c for c in ready[: view.space.rungs[rung - 1].promote] if c not in decided]
    there = [c for c in view.incumbents[1:] if view.trials_at.get((c, rung)) and c not in decided]
    return list(dict.fromkeys(there + ready))


def promotion_runs(view: StudyView) -> list[tuple[str, int, list[int]]]:
    """(candidate, rung, seeds) that promotion wants: the entrant and the baseline on the same seeds."""
    runs = []
    for rung in range(1, len(view.space.rungs)):
        seeds = [seed_of(rung, i) for i in range(view.space.rungs[rung].seeds)]
        climbers = entrants(view, rung)
        for candidate in climbers:
            runs.append((candidate, rung, seeds))
        if climbers:
            runs.append((view.baseline, rung, seeds))
    return runs


def _is_settled(trial: Trial | None) -> bool:
    return trial is not None and trial.over and (trial.state == TrialState.FAIL or SPLIT in trial.scores)


def conclude(view: StudyView) -> list[dict]:
    """`promoted` events for every promotion whose runs are all over."""
    events = []
    for candidate, rung, seeds in promotion_runs(view):
        if candidate == view.baseline:
            continue
        ids = [[trial_id(c, rung, s) for s in seeds] for c in (candidate, view.baseline)]
        trials = [[view.trials.get(i) for i in row] for row in ids]
        if not all(map(_is_settled, itertools.chain(*trials))):
            continue
        done = [
            s for s, a, b in zip(seeds, *trials, strict=True) if a.state == b.state == TrialState.COMPLETE
        ]
        event = {"event": "promoted", "candidate": candidate, "rung": rung, "against": view.baseline}
        event |= {"depth": view.space.rungs[rung].depth, "n": len(done), "complete": len(done) == len(seeds)}
        event |= {"trials": [trial_id(candidate, rung, s) for s in done]}
        event |= {"control": [trial_id(view.baseline, rung, s) for s in done]}
        failed = sum(t.state == TrialState.FAIL for t in trials[0])
        event |= {"split": SPLIT, "delta": None, "se": None, "low": None, "high": None}
        if len(done) >= 2:
            runs = [view.scores(c, rung, SPLIT) for c in (view.baseline, candidate)]
            control, mine = ({s: r[s] for s in done} for r in runs)
            delta, se, low, high = paired_interval(control, mine)
            event |= {"delta": delta, "se": se, "low": low, "high": high}
            event["reason"] = "gains" if low > 0 else "loses" if high < 0 else "undecided"
        if failed or len(done) < 2:
            event["reason"] = (
                f"{failed} of its {len(seeds)} runs failed" if failed else "the baseline's runs failed"
            )
        events.append(event)
    return events
