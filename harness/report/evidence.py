"""The report's numbers once more, by a second path: from the records and textbook formulas, not from `build`."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np

from harness.ledger import Event
from harness.records import LISTED_ARM, Trial
from harness.report.counts import Facts, counted, kept, spent
from harness.report.document import Number, Report, walk
from harness.view import StudyView

Scores = dict[
    tuple[str, int, str], dict[int, float]
]  # (settings' owner, rung, split) -> seed -> bits per byte
ANY_STATE = ("price", "failures", "seconds")  # what these count, failed trials may be part of


def recheck(view: StudyView, report: Report) -> list[str]:
    """One line per number that the records do not bear out."""
    problems = _wrong_verdicts(view)
    known = facts(view)
    complete = {t.id for t in view.trials.values() if t.finished.get("state") == "COMPLETE"}
    for number in dict.fromkeys(walk(report, Number)):
        if number.value is not None and number.key.split("/")[0] not in ANY_STATE:
            loose = [t for t in number.trials if t not in complete]
            problems += [f"{number.key}: {number} stands on {t}, which has no COMPLETE finish" for t in loose]
        if number.key not in known:
            problems.append(f"{number.key}: {number} stands there, the records give nothing")
        elif not _same(number.value, known[number.key]):
            problems.append(
                f"{number.key}: {number.value} stands there, the records give {known[number.key]}"
            )
    return problems


def _same(a: float | int | None, b: float | int | None) -> bool:
    if a is None or b is None:
        return a is b
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)


def facts(view: StudyView) -> Facts:
    """Every number a report may show, by its key."""
    scores = _scores(view)
    parts = (_measured(view, scores), _decided(view), _compared(view), counted(view), spent(view))
    return {key: value for part in parts for key, value in part.items()}


def _scores(view: StudyView) -> Scores:
    scores: Scores = defaultdict(dict)
    for t in view.trials.values():
        c = view.candidates[t.candidate].proposed
        if t.finished.get("state") == "COMPLETE":
            for split, value in t.scores.items():
                scores[c["against"] if c.get("placebo") else t.candidate, t.rung, split][t.seed] = value
    return scores


def _pooled(view: StudyView, scores: Scores, rung: int) -> tuple[float, int, float] | None:
    """(variance, df, seed correlation) at a rung, or None where no settings ran twice."""
    runs = {
        owner: np.array(list(s.values()))
        for (owner, r, split), s in scores.items()
        if (r, split) == (rung, "val")
    }
    df = sum(len(x) - 1 for x in runs.values())
    if df <= 0:
        return None
    spread = {k: (x - x.mean()) / math.sqrt(1 - 1 / len(x)) for k, x in runs.items() if len(x) > 1}
    cap = 4 * 1.4826 * float(np.median(np.abs(np.concatenate(list(spread.values()))))) or math.inf
    capped = {k: np.clip(x, -cap, cap) for k, x in spread.items()}
    variance = max(sum((x**2).sum() * (1 - 1 / len(x)) for x in capped.values()) / df, 1e-18)
    sums = np.zeros((2, 2))
    for owner in runs:
        mine, theirs = (
            scores[owner, rung, "val"],
            scores.get((view.candidates[owner].against, rung, "val"), {}),
        )
        both = [(theirs[s], mine[s]) for s in mine if s in theirs]
        if len(both) >= 2:
            sums += (len(both) - 1) * np.cov(np.array(both).T)
    return variance, df, float(np.clip(sums[0, 1] / (sums.diagonal().max() + 6 * variance), 0.0, 0.95))


def _gain(runs: dict[int, float], control: dict[int, float], v: float, rho: float) -> tuple[float, float]:
    """Control-variate difference and its standard error (see `harness.stats.difference`)."""
    c, x, n, m = np.mean(list(control.values())), np.mean(list(runs.values())), len(runs), len(control)
    if not runs.keys() <= control.keys():
        return float(c - x), math.sqrt(v * (1 / n + 1 / m))
    on_seeds = np.mean([control[s] for s in runs])
    return float(c - (x - rho * (on_seeds - c))), math.sqrt(v * ((1 - rho**2) / n + (1 - rho) ** 2 / m))


def _t(df: int) -> float:
    from scipy.stats import t

    return float(t.isf(0.025, df))


def _measured(view: StudyView, scores: Scores) -> Facts:
    from scipy.stats import chi2

    found: Facts = {f"mean/{c}/{r}/{s}": float(np.mean(list(x.values()))) for (c, r, s), x in scores.items()}
    base, rule = view.baseline, view.space.decision
    for c in view.candidates:
        found.setdefault(f"mean/{c}/0/val", None)
    for rung in range(len(view.space.rungs)):
        control, noise = scores.get((base, rung, "val"), {}), _pooled(view, scores, rung)
        found.setdefault(f"mean/{base}/{rung}/val", None)
        found[f"control/{rung}/n"] = n = len(control)
        sd = float(np.std(list(control.values()), ddof=1)) if n >= 2 else None
        found[f"control/{rung}/sd"] = sd
        for name, q in (("low", 0.025), ("high", 0.975)):
            found[f"control/{rung}/{name}"] = sd and sd * math.sqrt((n - 1) / float(chi2.isf(q, n - 1)))
        if noise:
            found |= {
                f"noise/{rung}/sigma": noise[0] ** 0.5,
                f"noise/{rung}/df": noise[1],
                f"noise/{rung}/rho": noise[2],
            }
        for (owner, r, split), runs in scores.items():
            if (r, split) == (rung, "val"):
                found |= _row(view, owner, rung, runs, control, noise)
    noise, m = _pooled(view, scores, 0), len(scores.get((view.incumbent, 0, "val"), {}))
    for i, n in enumerate(rule.looks):
        if noise and m:
            se = math.sqrt(noise[0] * ((1 - noise[2] ** 2) / n + (1 - noise[2]) ** 2 / m))
            found[f"needed/{i}"] = rule.keep[i] * (1 + 1.5 / noise[1]) * se
    ends = [scores.get((c, 0, "audit"), {}) for c in (base, view.incumbent)]
    return found | _paired("whole", *ends)


def _row(view: StudyView, owner: str, rung: int, runs: dict, control: dict, noise: tuple | None) -> Facts:
    key = f"{owner}/{rung}"
    owners = [owner, *(c.id for c in view.candidates.values() if c.placebo and c.against == owner)]
    seconds = [
        t.finished["train_seconds"]
        for t in view.trials.values()
        if t.candidate in owners
        and t.rung == rung
        and "val" in t.scores
        and t.finished.get("train_seconds") is not None
    ]
    found: Facts = {f"n/{key}": len(runs), f"train/{key}": float(np.mean(seconds)) if seconds else None}
    found |= {f"se/{key}": noise and math.sqrt(noise[0] / len(runs)), f"gain/{key}/delta": None}
    if noise and control and owner != view.baseline:
        delta, se = _gain(runs, control, noise[0], noise[2])
        half = _t(noise[1]) * se
        found |= {
            f"gain/{key}/delta": delta,
            f"gain/{key}/low": delta - half,
            f"gain/{key}/high": delta + half,
        }
    return found


def _paired(key: str, control: dict[int, float], runs: dict[int, float]) -> Facts:
    gains = np.array([control[s] - runs[s] for s in runs if s in control])
    found: Facts = {f"{key}/n": len(gains), f"{key}/delta": None, f"{key}/low": None, f"{key}/high": None}
    if len(gains) >= 2:
        half = _t(len(gains) - 1) * gains.std(ddof=1) / math.sqrt(len(gains))
        middle = gains.mean()
        found |= {f"{key}/delta": middle, f"{key}/low": middle - half, f"{key}/high": middle + half}
    return found


def _listed(view: StudyView, trials: list[str], split: str) -> dict[int, float]:
    known = (view.trials[t] for t in trials if t in view.trials)
    return {
        t.seed: t.scores[split] for t in known if split in t.scores and t.finished.get("state") == "COMPLETE"
    }


def _verdict(view: StudyView, e: Event) -> Facts:
    """delta, se, z and interval of a verdict from the scores of the trials it lists; n and m are their counts."""
    runs, control = (_listed(view, e[side], e["split"]) for side in ("trials", "control"))
    found: Facts = {"n": len(runs), "m": len(control) if "m" in e else None}
    if "delta" not in e or not runs or not control:
        return found | dict.fromkeys(("delta", "se", "z", "low", "high"))
    delta, se = _gain(runs, control, e["sigma"] ** 2, e["rho"])
    half = _t(e["df"]) * se
    return found | {"delta": delta, "se": se, "z": delta / se, "low": delta - half, "high": delta + half}


def _wrong_verdicts(view: StudyView) -> list[str]:
    problems = []
    for c in view.candidates.values():
        for i, e in enumerate(c.verdicts):
            again = _verdict(view, e)
            problems += [
                f"verdict {i} of {c.id}: {name} {e[name]} is recorded, its trials give {again[name]}"
                for name in ("n", "m", "delta", "se", "z")
                if name in e and not _same(e[name], again[name])
            ]
            if e["verdict"] == "keep" and not e["z"] >= e["bounds"][1]:
                problems.append(
                    f"verdict {i} of {c.id}: kept with z {e['z']} below its bound {e['bounds'][1]}"
                )
    return problems


def _decided(view: StudyView) -> Facts:
    found: Facts = {"keeps": sum(kept(c) for c in view.candidates.values())}
    for c in view.candidates.values():
        for i, e in enumerate(c.verdicts):
            found |= {f"verdict/{c.id}/{i}/{name}": value for name, value in _verdict(view, e).items()}
            for a in (view.trials[t] for t in e["trials"]):
                for b in (view.trials[t] for t in e["control"] if view.trials[t].seed == a.seed):
                    if e["split"] in a.scores and e["split"] in b.scores:
                        gain = np.subtract(b.scores[e["split"]], a.scores[e["split"]])
                        found[f"pair/{a.id}/{b.id}/{e['split']}"] = float(gain)
    for i, e in enumerate(view.promoted):
        found |= _paired(
            f"promoted/{i}", _listed(view, e["control"], e["split"]), _listed(view, e["trials"], e["split"])
        )
    return found


def _compared(view: StudyView) -> Facts:
    """The numbers of every listed design beside the baseline's, at every rung."""
    found: Facts = {}
    shown = [
        c for c in view.candidates.values() if c.arm == LISTED_ARM or c.id in (view.baseline, view.source)
    ]
    for rung in range(len(view.space.rungs)):
        base = _complete(view, view.baseline, rung)
        for c in shown:
            key, runs = f"compared/{c.id}/{rung}", _complete(view, c.id, rung)
            rivals = base if c.id != view.baseline else []
            levels = [{t.seed: t.scores["val"] for t in trials} for trials in (rivals, runs)]
            usual, seconds = map(_median_seconds, (base, runs))
            found |= {
                f"{key}/n": len(runs),
                f"{key}/bpb": float(np.mean([*levels[1].values()])) if runs else None,
            }
            found |= {f"{key}/seconds": seconds, f"{key}/relative": seconds and usual and seconds / usual}
            found |= _paired(f"{key}/paired", *levels)
    return found


def _complete(view: StudyView, candidate: str, rung: int) -> list[Trial]:
    mine = (t for t in view.trials.values() if (t.candidate, t.rung) == (candidate, rung))
    return [t for t in mine if t.finished.get("state") == "COMPLETE" and "val" in t.scores]


def _median_seconds(trials: list[Trial]) -> float | None:
    seconds = [t.finished["train_seconds"] for t in trials if t.finished.get("train_seconds") is not None]
    return float(np.median(seconds)) if seconds else None
