"""Quantities that several sections of the report show, as numbers with their trials."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from harness.ledger import Event
from harness.records import Candidate, Trial, TrialState
from harness.report.document import MISSING, Code, Line, Number, compact, join, plain
from harness.space import Setting, settings_diff
from harness.stats import Noise, noise_at, paired_interval
from harness.view import StudyView


@cache
def t_half_width(df: int, level: float = 0.95) -> float:
    """Half the width of a two-sided t interval, in standard errors."""
    from scipy.stats import t

    return float(t.ppf((1 + level) / 2, df))


@dataclass(frozen=True)
class Claim:
    """One verdict's numbers, ready to be shown."""

    delta: Number
    low: Number
    high: Number
    se: Number
    z: Number
    n: Number
    m: Number


def claim(candidate: Candidate, index: int) -> Claim:
    e = candidate.verdicts[index]
    index %= len(candidate.verdicts)
    trials = (*e["trials"], *e["control"]) if "delta" in e else ()

    def number(name: str, form: str, value: float | int | None) -> Number:
        return Number(value, form, f"verdict/{candidate.id}/{index}/{name}", trials)

    delta, se = e.get("delta"), e.get("se")
    half = None if se is None else t_half_width(e["df"]) * se
    return Claim(
        delta=number("delta", "+.4f", delta),
        low=number("low", "+.4f", None if half is None else delta - half),
        high=number("high", "+.4f", None if half is None else delta + half),
        se=number("se", ".4f", se),
        z=number("z", "+.2f", e.get("z")),
        n=number("n", "d", e["n"]),
        m=number("m", "d", e.get("m")),
    )


def interval(delta: Number, low: Number, high: Number) -> Line:
    return (delta, " (95 % ", low, " to ", high, ")")


def cited(trials: Iterable[str]) -> Line:
    return join([(Code(group),) for group in compact(trials)], ", ") or (MISSING,)


def called(candidate: Candidate) -> Line:
    """The candidate's id, after its name where it has one."""
    return (*([candidate.name, " "] if candidate.name else []), Code(candidate.id))


def spell(value: Setting | None) -> str:
    """A setting as TOML and the trainer's command line read it; floats shortened for the eye."""
    if value is None:
        return "default"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def changes(view: StudyView, candidate: Candidate, other: str) -> Line:
    """The smallest diff of settings (and code) against another candidate."""
    old = view.candidates[other]
    lines: list[Line] = [
        (Code(f"{key}: {spell(before)} → {spell(after)}"),)
        for key, (before, after) in settings_diff(old.settings, candidate.settings).items()
    ]
    if candidate.proposed["trainer_sha256"] != old.proposed["trainer_sha256"]:
        commit = candidate.proposed.get("commit") or "unknown"
        lines.append(("trainer code, commit ", Code(commit[:12])))
    return join(lines, ", ") or ("nothing",)


def mean(view: StudyView, candidate: str, rung: int, split: str = "val") -> Number:
    """Mean score of all runs of these settings, placebos of an incumbent included."""
    runs = view.control(candidate, rung, split)
    trials = view.control_trials(candidate, rung, runs)
    value = sum(runs.values()) / len(runs) if runs else None
    return Number(value, ".4f", f"mean/{candidate}/{rung}/{split}", tuple(trials))


def whole_gain(view: StudyView) -> Line:
    """The last keep against the baseline on the audit split: gain, interval, number of shared seeds.

    Empty where the two have no two audited seeds in common.
    """
    first, last = view.baseline, view.incumbent
    control, runs = (view.control(c, 0, "audit") for c in (first, last))
    shared = sorted(control.keys() & runs.keys())
    if len(shared) < 2:
        return ()
    delta, _, low, high = paired_interval(control, runs)
    trials = (*view.control_trials(last, 0, shared), *view.control_trials(first, 0, shared))
    values = {"delta": delta, "low": low, "high": high}
    numbers = [Number(value, "+.4f", f"whole/{name}", trials) for name, value in values.items()]
    return (*interval(*numbers), Number(len(shared), "d", "whole/n", trials))


def starting_point(view: StudyView) -> list[str]:
    """What every training went on from, as a sentence; none where they began from nothing."""
    if view.source:
        run = f"every other run of a rung went on from candidate {view.source}'s run there"
        return [f"{run}: intervals hold for that one source, another may move them"]
    if path := view.space.source.checkpoint:
        return [f"every run went on from {plain(path)}, sha256 {view.opened['source']}"]
    return []


def verdict_name(e: Event) -> str:
    return "to audit" if e["verdict"] == "retest" and e["provisional"] else e["verdict"]


def known_noise(view: StudyView, rung: int) -> Noise | None:
    """The rung's noise floor, or None while no setting has two runs there."""
    owners = {c for (c, r), trials in view.trials_at.items() if r == rung and trials}
    runs = [view.control(c, rung, "val") for c in owners if not view.candidates[c].placebo]
    return noise_at(view, rung) if any(len(r) >= 2 for r in runs) else None


def score(trial: Trial, split: str) -> Number:
    value = trial.scores.get(split) if trial.state == TrialState.COMPLETE else None
    return Number(value, ".6f", f"trial/{trial.id}/{split}", (trial.id,))
