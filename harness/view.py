"""The study as the ledger tells it: a fold of events that every decision, sampler and report reads."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from datetime import datetime
from typing import Any

from harness.ledger import Event
from harness.records import (
    BASELINE_ARM,
    SOURCE_ARM,
    Candidate,
    FailureKind,
    Status,
    Trial,
    TrialState,
    seed_of,
    trial_id,
)
from harness.space import Rung, Space


class StudyView:
    """Fold of one ledger. `apply` takes events in order; everything else reads."""

    def __init__(self, events: Iterable[Event] = ()):
        self.opened: Event = {}
        self.space: Space = None  # type: ignore[assignment]  # set by the first event
        self.candidates: dict[str, Candidate] = {}
        self.trials: dict[str, Trial] = {}
        self.incumbents: list[str] = []  # the baseline, then each keep
        self.source: str | None = None  # the candidate whose run the others of a rung go on from
        self.rejected: list[Event] = []
        self.promoted: list[Event] = []
        self.reviews: dict[str, Event] = {}  # the last review of each candidate
        self.spends: list[Event] = []
        self.sessions: list[Event] = []  # `opened` and `stopped`, in order
        self.decisions_since_keep = 0
        self.memo: dict[tuple, Any] = {}  # what others computed from the view; empty after every event
        self.seconds_at: dict[int, list[float]] = defaultdict(list)  # rung -> seconds of complete trials
        self.gpu_seconds = 0.0
        self.num_started = 0  # trainings begun, repeated ones included
        self.asked: Counter[str] = Counter()  # arm -> proposals taken from it, refused ones included
        self.open: dict[str, Candidate] = {}  # candidates without a final verdict
        self._placebos: dict[str, list[str]] = defaultdict(list)  # incumbent -> its placebos
        self._spans: list[list[datetime]] = []  # first and last record of each session
        self.trials_at: dict[tuple[str, int], list[str]] = defaultdict(list)  # (candidate, rung) -> trials
        for event in events:
            self.apply(event)

    def apply(self, event: Event) -> None:
        self.memo.clear()
        t = datetime.fromisoformat(event["t"])
        if event["event"] == "opened":
            self._spans.append([t, t])
        elif event["event"] != "reviewed":  # a person's review is not the night's time
            self._spans[-1][1] = t
        getattr(self, "_on_" + event["event"])(event)

    def _on_opened(self, e: Event) -> None:
        self.sessions.append(e)
        if not self.opened:
            self.opened = e
            self.space = Space.model_validate(e["space"])
        for trial in self.trials.values():  # whatever the last driver left running died with it
            if trial.state == TrialState.RUNNING:
                last = self._spans[-2][1] if len(self._spans) > 1 else trial.started
                self._spend(trial, (last - trial.started).total_seconds())
                trial.state, trial.failure = TrialState.FAIL, FailureKind.LOST
                trial.detail = "the driver ended while it ran"

    def _on_proposed(self, e: Event) -> None:
        candidate = Candidate(
            id=e["candidate"],
            arm=e["arm"],
            order=len(self.candidates),
            settings=e["settings"],
            parent=e["parent"],
            against=e["against"],
            placebo=e.get("placebo", False),
            proposed=e,
        )
        self.candidates[candidate.id] = candidate
        self.asked[candidate.arm] += 1
        if candidate.arm == BASELINE_ARM:
            candidate.status = Status.KEPT
            self.incumbents.append(candidate.id)
            return
        if candidate.arm == SOURCE_ARM:
            candidate.status, self.source = Status.SOURCE, candidate.id
            return
        self.open[candidate.id] = candidate
        if candidate.placebo:
            self._placebos[candidate.against].append(candidate.id)

    def _on_rejected(self, e: Event) -> None:
        self.rejected.append(e)
        self.asked[e["arm"]] += 1

    def _on_started(self, e: Event) -> None:
        self.num_started += 1
        trial = self.trials.get(e["trial"])
        if trial is None:
            trial = Trial(e["trial"], e["candidate"], e["rung"], e["seed"], e["purpose"])
            self.trials[trial.id] = trial
            self.candidates[trial.candidate].trials.append(trial.id)
            self.trials_at[trial.candidate, trial.rung].append(trial.id)
        assert trial.state != TrialState.COMPLETE, f"{trial.id} started twice"
        trial.state, trial.failure, trial.detail = TrialState.RUNNING, None, ""
        trial.started = datetime.fromisoformat(e["t"])

    def _on_judged(self, e: Event) -> None:
        self.trials[e["trial"]].scores[e["split"]] = e["bpb"]

    def _on_finished(self, e: Event) -> None:
        trial = self.trials[e["trial"]]
        trial.state = TrialState(e["state"])
        trial.failure = FailureKind(e["failure"]) if trial.state == TrialState.FAIL else None
        if e["seconds"] is not None:
            self._spend(trial, e["seconds"])
            usual = trial.candidate != self.source  # which may train longer
            if usual and trial.state == TrialState.COMPLETE:
                self.seconds_at[trial.rung].append(e["seconds"])
        trial.losses += trial.failure == FailureKind.LOST
        trial.detail = e.get("detail", "")
        trial.finished = e

    def _spend(self, trial: Trial, seconds: float) -> None:
        trial.seconds += seconds
        self.gpu_seconds += seconds * self.space.rungs[trial.rung].gpus

    def _on_verdict(self, e: Event) -> None:
        candidate = self.candidates[e["candidate"]]
        candidate.verdicts.append(e)
        if e["verdict"] == "retest":
            candidate.status = Status.AUDIT if e["provisional"] else Status.OPEN
            return
        self.open.pop(candidate.id, None)
        self.decisions_since_keep += 1
        if e["verdict"] == "keep":
            candidate.status = Status.KEPT
            if not candidate.placebo:
                self.incumbents.append(candidate.id)
                if self.incumbent == candidate.id:
                    self.decisions_since_keep = 0
        else:
            candidate.status = Status.NO_EFFECT if e["verdict"] == "no-effect" else Status.DISCARDED

    def _on_promoted(self, e: Event) -> None:
        self.promoted.append(e)

    def _on_reviewed(self, e: Event) -> None:
        self.reviews[e["candidate"]] = e

    def _on_spend(self, e: Event) -> None:
        self.spends.append(e)

    def _on_stopped(self, e: Event) -> None:
        self.sessions.append(e)

    # ---- what decisions and reports ask ----

    @property
    def baseline(self) -> str:
        return self.incumbents[0]

    @property
    def standards(self) -> list[str]:
        """What candidates were measured against, one after the other."""
        return self.incumbents if self.space.decision.against == "incumbent" else self.incumbents[:1]

    @property
    def incumbent(self) -> str:
        """What candidates are measured against now."""
        return self.standards[-1]

    def source_trial(self, rung: int) -> str | None:
        """The study's own run that every other trial of the rung goes on from."""
        return self.source and trial_id(self.source, rung, seed_of(rung, 0))

    def tokens(self, candidate: str, rung: int) -> int:
        """Tokens that one training of the candidate takes there: its horizon's share of the rung's budget."""
        facts = self.candidates[candidate].proposed["facts_by_rung"][rung]
        return facts.get("tokens", self.space.rungs[rung].tokens)

    def flops(self, candidate: str, rung: int) -> float:
        """FLOPs of one training of the candidate there."""
        facts = self.candidates[candidate].proposed["facts_by_rung"][rung]
        return facts["flops_per_token"] * self.tokens(candidate, rung)

    def rung(self, index: int) -> Rung:
        return self.space.rungs[index]

    def scores(self, candidate: str, rung: int, split: str) -> dict[int, float]:
        """seed -> bits per byte of the candidate's complete trials at a rung."""
        trials = (self.trials[t] for t in self.trials_at[candidate, rung])
        return {
            t.seed: t.scores[split] for t in trials if t.state == TrialState.COMPLETE and split in t.scores
        }

    def control(self, incumbent: str, rung: int, split: str) -> dict[int, float]:
        """seed -> bits per byte of all runs of the incumbent's settings, its placebos' included."""
        runs = self.scores(incumbent, rung, split)
        for placebo in self._placebos[incumbent]:
            runs |= self.scores(placebo, rung, split)
        return runs

    def trials_of(self, candidate: str, rung: int, seeds: Collection[int]) -> list[str]:
        """Ids of the candidate's complete trials on these seeds, in the order of the seeds."""
        done = {self.trials[t].seed: t for t in self.trials_at[candidate, rung]}
        return [done[s] for s in seeds if self.trials[done[s]].state == TrialState.COMPLETE]

    def control_trials(self, incumbent: str, rung: int, seeds: Collection[int]) -> list[str]:
        """Ids of the trials behind `control` on these seeds."""
        owners = [incumbent, *self._placebos[incumbent]]
        done = {self.trials[t].seed: t for c in owners for t in self.trials_at[c, rung]}
        return [done[s] for s in sorted(seeds)]

    def failures(self, candidate: str, rung: int) -> list[Trial]:
        """The candidate's trials at the rung that ended for good without a score."""
        trials = (self.trials[t] for t in self.trials_at[candidate, rung])
        return [t for t in trials if t.over and t.state == TrialState.FAIL]

    def spent_usd(self) -> float:
        """Settled cost of all calls plus what is reserved for calls still out."""
        calls: dict[str, float] = {}
        for e in self.spends:
            calls[e["call"]] = e["usd"]
        return sum(calls.values())

    def elapsed_seconds(self) -> float:
        """Wall time of all sessions, each from its opening to its last record."""
        return sum((last - first).total_seconds() for first, last in self._spans)


def history(view: StudyView, candidate: str) -> str:
    """A candidate's verdicts and promotions, a line each."""
    lines = [
        f"{v['verdict']} stage={v['stage']} n={v['n']} delta={signed(v.get('delta'))} "
        f"se={signed(v.get('se'))} {v['reason']}"
        for v in view.candidates[candidate].verdicts
    ]
    lines += [
        f"promoted depth={e['depth']} n={e['n']} delta={signed(e['delta'])} {e['reason']}"
        for e in view.promoted
        if e["candidate"] == candidate
    ]
    return "\n".join(lines)


def signed(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:+.{digits}f}"
