"""Is a candidate better than the incumbent? Pure functions over numbers, then over the ledger's view.

The rule: looks at 1, 2, 4, 8 seeds with drop and keep bounds on z, then an audit on fresh seeds and a
split that no look has read. The difference is a control-variate one: it pairs seeds as far as they correlate.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from harness.records import Candidate, Status, TrialState, seed_of, trial_id
from harness.space import Decision
from harness.view import StudyView

Runs = Mapping[int, float]  # seed -> bits per byte (lower is better)
RHO_PRIOR_RUNS = 6  # weight of "seeds do not correlate" in the pooled correlation, in runs
MAX_RHO = 0.95
OUTLIER = 4.0  # standard deviations
MAD_TO_SD = 1.4826  # median absolute deviation of a Gaussian -> standard deviation


@dataclass(frozen=True)
class Noise:
    """Pooled over all settings with two or more seeds at a rung."""

    variance: float  # of one run across seeds, (bits per byte)^2
    df: int
    rho: float  # correlation of two settings' runs on one seed

    @property
    def sigma(self) -> float:
        return math.sqrt(self.variance)


@dataclass(frozen=True)
class Difference:
    """Gain of a candidate over the control: control minus candidate, positive is better."""

    delta: float
    se: float
    n: int
    m: int

    @property
    def z(self) -> float:
        return self.delta / self.se


def pooled_noise(groups: Iterable[Runs], pairs: Iterable[tuple[Runs, Runs]] = ()) -> Noise:
    """Variance over `groups` (runs of one setting each); seed correlation over (control, candidate) pairs.

    Residuals, scaled to one run's standard deviation, are winsorised at four robust ones.

    The correlation is the smaller of the two regressions between candidate and control residuals over shared
    seeds (where one side is noisier, the other one would promise too small an error), shrunk towards 0 by a
    few runs' weight and clipped to [0, 0.95].
    """
    values = [np.array(list(runs.values())) for runs in groups if len(runs) >= 2]
    assert values, "no setting has two seeds"
    df = sum(len(v) - 1 for v in values)
    residuals = np.concatenate([(v - v.mean()) * math.sqrt(len(v) / (len(v) - 1)) for v in values])
    weights = np.concatenate([np.full(len(v), (len(v) - 1) / len(v)) for v in values])
    limit = OUTLIER * MAD_TO_SD * float(np.median(np.abs(residuals)))
    if limit > 0:  # one unstable setting must not blind the night to all others
        residuals = np.clip(residuals, -limit, limit)
    variance = max(float((weights * residuals**2).sum()) / df, 1e-18)  # a floor keeps z finite
    sxy = sxx = syy = 0.0
    for control, candidate in pairs:
        seeds = sorted(control.keys() & candidate.keys())
        if len(seeds) >= 2:
            x = np.array([control[s] for s in seeds])
            y = np.array([candidate[s] for s in seeds])
            sxy += float(((x - x.mean()) * (y - y.mean())).sum())
            sxx += float(((x - x.mean()) ** 2).sum())
            syy += float(((y - y.mean()) ** 2).sum())
    rho = min(MAX_RHO, max(0.0, sxy / (max(sxx, syy) + RHO_PRIOR_RUNS * variance)))
    return Noise(variance, df, rho)


def difference(control: Runs, candidate: Runs, noise: Noise) -> Difference:
    """Control-variate difference of means.

    D = c - [x - rho (c_n - c)],  se^2 = v [(1 - rho^2) / n + (1 - rho)^2 / m], where c is the mean of all m
    control runs, c_n their mean on the candidate's n seeds, x the candidate's mean. Without shared seeds
    rho is 0. At rho = 0 this is the unpaired difference, at rho = 1 the paired one.
    """
    n, m = len(candidate), len(control)
    shared = candidate.keys() <= control.keys()
    rho = noise.rho if shared else 0.0
    mean = float(np.mean(list(control.values())))
    on_seeds = float(np.mean([control[s] for s in candidate])) if shared else mean
    delta = mean - (float(np.mean(list(candidate.values()))) - rho * (on_seeds - mean))
    return Difference(delta, math.sqrt(noise.variance * ((1 - rho**2) / n + (1 - rho) ** 2 / m)), n, m)


def look(z: float, index: int, df: int, rule: Decision) -> str:
    """drop | more | provisional at one look; the keep bound widens while the noise is poorly known."""
    if z >= rule.keep[index] * (1 + 1.5 / df):
        return "provisional"
    if z <= rule.drop[index] or index == len(rule.looks) - 1:
        return "drop"
    return "more"


# ---- the same over a study's view ----


def noise_at(view: StudyView, rung: int, split: str = "val") -> Noise:
    """Noise floor of a rung from every setting that has two or more complete runs there."""
    if (known := view.memo.get(("noise", rung, split))) is not None:
        return known
    groups = {c: view.scores(c, rung, split) for c in view.candidates if view.trials_at.get((c, rung))}
    for incumbent in view.incumbents:
        groups[incumbent] = view.control(incumbent, rung, split)
    placebo_free = {c: runs for c, runs in groups.items() if not view.candidates[c].placebo}
    pairs = [
        (groups.get(view.candidates[c].against, {}), runs)
        for c, runs in placebo_free.items()
        if view.candidates[c].against
    ]
    noise = view.memo["noise", rung, split] = pooled_noise(placebo_free.values(), pairs)
    return noise


def control_size(view: StudyView) -> int:
    """Runs the incumbent should have at the first rung: it grows slowly with the decisions it served."""
    rule = view.space.decision
    return view.space.rungs[0].seeds + view.decisions_since_keep // rule.refresh


def look_seeds(view: StudyView, candidate: Candidate, count: int) -> list[int]:
    """Seeds from the head of the rung's list on which the incumbent runs, or of the placebo's own block."""
    if candidate.placebo:
        return [seed_of(0, candidate.proposed["seed_block"] + i) for i in range(count)]
    return control_seeds(view, count)


def needed_seeds(view: StudyView, candidate: Candidate) -> tuple[list[int], str]:
    """The seeds whose scores the candidate's next decision reads, and the split it reads them on."""
    rule = view.space.decision
    if candidate.status == Status.AUDIT:
        looked = {view.trials[t].seed for v in candidate.verdicts for t in v["trials"]}
        seeds = look_seeds(view, candidate, len(looked) + rule.audit_seeds)
        return [s for s in seeds if s not in looked][: rule.audit_seeds], "audit"
    taken = candidate.last["n"] if candidate.last else 0
    return look_seeds(view, candidate, next(n for n in rule.looks if n > taken)), "val"


def decide(view: StudyView, candidate: Candidate) -> dict | None:
    """The next verdict of an open candidate as a `verdict` event, or None while runs are missing."""
    rule, incumbent = view.space.decision, view.incumbent
    failure = next(iter(view.failures(candidate.id, 0)), None)
    seeds, split = needed_seeds(view, candidate)
    stage = "audit" if candidate.status == Status.AUDIT else "look"
    event = {"event": "verdict", "candidate": candidate.id, "stage": stage, "rung": 0, "against": incumbent}
    event |= {"provisional": False, "split": split}
    if failure:
        reason = f"{failure.failure}: {failure.detail}"[:300]
        return event | {"verdict": "discard", "n": 0, "trials": [failure.id], "control": [], "reason": reason}
    runs = {s: v for s, v in view.scores(candidate.id, 0, split).items() if s in set(seeds)}
    control = view.control(incumbent, 0, split)
    if candidate.placebo:  # its runs are the incumbent's too, but it is not measured against itself
        own = {view.trials[t].seed for t in view.trials_at[candidate.id, 0]}
        control = {s: v for s, v in control.items() if s not in own}
    first = control_seeds(view, view.space.rungs[0].seeds)
    wanted = audit_control_seeds(view, candidate, seeds) if stage == "audit" else first
    if len(runs) < len(seeds) or not control.keys() >= set(wanted):
        return None
    noise = noise_at(view, 0)
    if stage == "audit":  # another split may be the noisier one: the claim takes the wider error
        noise = max(noise, noise_at(view, 0, "audit"), key=lambda n: n.variance)
    d = difference(control, runs, noise)
    event |= {"n": d.n, "m": d.m, "delta": d.delta, "se": d.se, "z": d.z}
    event |= {"sigma": noise.sigma, "df": noise.df, "rho": noise.rho}
    event |= {
        "trials": view.trials_of(candidate.id, 0, seeds),
        "control": view.control_trials(incumbent, 0, control),
    }
    if stage == "audit":
        kept = d.z >= rule.audit_z
        event |= {"bounds": [rule.audit_z, rule.audit_z], "verdict": "keep" if kept else "discard"}
        return event | {"reason": "the audit confirms it" if kept else "the audit does not confirm it"}
    index = rule.looks.index(len(seeds))
    event["bounds"] = [rule.drop[index], rule.keep[index] * (1 + 1.5 / noise.df)]
    if not candidate.placebo and _same_curve(view, candidate, incumbent):
        return event | {"verdict": "no-effect", "reason": "same curve as the incumbent on the same seed"}
    outcome = look(d.z, index, noise.df, rule)
    if outcome == "drop":
        return event | {"verdict": "discard", "reason": f"not better than the {rule.against}"}
    if outcome == "provisional":
        return event | {"verdict": "retest", "provisional": True, "reason": "to the audit"}
    return event | {"verdict": "retest", "reason": "undecided: more seeds"}


def control_seeds(view: StudyView, count: int) -> list[int]:
    """The first `count` seeds of the list on which the incumbent did not fail for good."""
    seeds: list[int] = []
    for index in itertools.count():
        if len(seeds) == count:
            return seeds
        if not fails(view, view.incumbent, seed_of(0, index)):
            seeds.append(seed_of(0, index))


def audit_control_seeds(view: StudyView, candidate: Candidate, seeds: list[int]) -> list[int]:
    """Control runs that an audit reads: the first runs, and those on the audit's own seeds."""
    first = control_seeds(view, view.space.rungs[0].seeds)
    paired = [] if candidate.placebo else [s for s in seeds if not fails(view, view.incumbent, s)]
    return sorted({*first, *paired})


def fails(view: StudyView, candidate: str, seed: int) -> bool:
    trial = view.trials.get(trial_id(candidate, 0, seed))
    return trial is not None and trial.over and trial.state == TrialState.FAIL


def _same_curve(view: StudyView, candidate: Candidate, incumbent: str) -> bool:
    """No-op: a run of the candidate and one of the incumbent on the same seed went through the same losses."""
    mine = {t.seed: t for t in map(view.trials.get, view.trials_at[candidate.id, 0])}
    theirs = {t.seed: t for t in map(view.trials.get, view.trials_at[incumbent, 0])}
    for seed in mine.keys() & theirs.keys():
        a, b = mine[seed], theirs[seed]
        if a.finished.get("curve") and a.finished["curve"] == b.finished.get("curve"):
            return a.scores.get("val") == b.scores.get("val")
    return False


def paired_interval(control: Runs, candidate: Runs, level: float = 0.95) -> tuple[float, float, float, float]:
    """Mean gain over shared seeds, its standard error and t interval: (delta, se, low, high).

    Needs two or more shared seeds.
    """
    from scipy.stats import t

    seeds = sorted(control.keys() & candidate.keys())
    assert len(seeds) >= 2, "a paired interval needs two shared seeds"
    gains = np.array([control[s] - candidate[s] for s in seeds])
    delta, se = float(gains.mean()), float(gains.std(ddof=1) / math.sqrt(len(gains)))
    half = float(t.ppf((1 + level) / 2, len(gains) - 1)) * se
    return delta, se, delta - half, delta + half
