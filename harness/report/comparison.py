"""The listed designs beside the baseline: what each learned, what it took, and what of that was equal."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from harness.records import LISTED_ARM, Candidate, Trial
from harness.report.document import Bullets, Chip, Line, Number, Prose, Section, Table, plain
from harness.report.quantities import called, starting_point, verdict_name
from harness.stats import paired_interval
from harness.view import StudyView

EQUAL = 0.02  # relative difference up to which two budgets are called equal
COLUMNS = ("design", "gain, bpb", "95 %", "val bpb", "n", "verdict", "equal to the baseline")
COLUMNS += ("stored", "active", "FLOPs a token", "tokens", "train s", "× baseline's")
COUNTS = {"stored": "params_total", "active": "params_active", "FLOPs": "flops_per_token", "tokens": "tokens"}
NOTE = (
    "One row a design of the search-space file. The gain is the mean over shared seeds of the baseline's bits per "
    "byte minus the design's, on the search split, with a paired t interval that is not widened for the number of "
    "designs; a kept row includes the runs it was chosen on, its audit below does not. train s is the median of its "
    f"runs. Equal is what lies within {100 * EQUAL:g} % of the baseline's."
)


def compared(view: StudyView) -> tuple[Section, ...]:
    """The section, where the search-space file lists designs."""
    if not view.space.candidates:
        return ()
    blocks: list[Section | Prose | Bullets | Table] = [Prose((NOTE,))]
    listed = [c for c in view.candidates.values() if c.arm == LISTED_ARM]
    first = [view.candidates[c] for c in (view.baseline, view.source) if c]
    for r, rung in enumerate(view.space.rungs):
        here = [c for c in listed if r == 0 or view.trials_at.get((c.id, r))]
        if r == 0 or here:
            rows = tuple(_row(view, c, r) for c in (*first, *here))
            title = f"Comparison at depth {rung.depth}, {rung.tokens:,} tokens"
            blocks.append(Section(title, (Table(COLUMNS, rows),)))
    lines: list[Line] = [(f"{line[0].upper()}{line[1:]}.",) for line in starting_point(view)]
    for e in view.rejected:
        if e["arm"] == LISTED_ARM:
            lines.append((f"Refused: {e['name']}, ", Chip(e["kind"]), ": ", plain(e["detail"])))
    if waiting := view.space.candidates[view.asked[LISTED_ARM] :]:
        lines.append(("Not begun: ", ", ".join(c.name for c in waiting)))
    return (Section("Comparison", (*blocks, *([Bullets(tuple(lines))] if lines else []))),)


def _row(view: StudyView, c: Candidate, rung: int) -> tuple[Line, ...]:
    key, runs, base = f"compared/{c.id}/{rung}", _runs(view, c.id, rung), _runs(view, view.baseline, rung)
    mine = tuple(t.id for t in runs.values())
    bpb = statistics.fmean(t.scores["val"] for t in runs.values()) if runs else None
    usual, seconds = _seconds(base.values()), _seconds(runs.values())
    relative = seconds / usual if seconds and usual else None
    counts = {name: _count(view, c.id, rung, fact) for name, fact in COUNTS.items()}
    pairs = [(n.value, _count(view, view.baseline, rung, COUNTS[name]).value) for name, n in counts.items()]
    equal = [name for name, (a, b) in zip(counts, pairs, strict=True) if abs(a - b) <= EQUAL * b]
    equal += ["seconds"] if relative and abs(relative - 1) <= EQUAL else []
    return (
        called(c) if c.name else (c.arm, " ", *called(c)),
        *_gain(view, c, rung, base, runs),
        (Number(bpb, ".4f", f"{key}/bpb", mine),),
        (Number(len(runs), "d", f"{key}/n", mine),),
        _verdict(view, c, rung),
        ("–" if c.id == view.baseline else ", ".join(equal) or "nothing",),
        *((number,) for number in counts.values()),
        (Number(seconds, ",.1f", f"{key}/seconds", mine),),
        (Number(relative, ".2f", f"{key}/relative", (*mine, *(t.id for t in base.values()))),),
    )


def _runs(view: StudyView, candidate: str, rung: int) -> dict[int, Trial]:
    """seed -> complete trial."""
    trials = {view.trials[t].seed: view.trials[t] for t in view.trials_at.get((candidate, rung), ())}
    return {seed: trials[seed] for seed in view.scores(candidate, rung, "val")}


def _seconds(trials: Iterable[Trial]) -> float | None:
    known = [t.finished["train_seconds"] for t in trials if t.finished.get("train_seconds") is not None]
    return statistics.median(known) if known else None


def _count(view: StudyView, candidate: str, rung: int, fact: str) -> Number:
    facts = view.candidates[candidate].proposed["facts_by_rung"][rung]
    return Number(facts[fact], ",d", f"facts/{candidate}/{rung}/{fact}")


def _gain(
    view: StudyView, c: Candidate, rung: int, base: dict[int, Trial], runs: dict[int, Trial]
) -> tuple[Line, Line]:
    """The gain over shared seeds, and its interval; both missing where fewer than two are shared."""
    shared = [s for s in runs if s in base and c.id != view.baseline]
    trials = tuple(side[s].id for side in (runs, base) for s in shared)
    values: dict[str, float | None] = dict.fromkeys(("delta", "low", "high"))
    if len(shared) >= 2:
        control, mine = ({s: side[s].scores["val"] for s in shared} for side in (base, runs))
        delta, _, low, high = paired_interval(control, mine)
        values = {"delta": delta, "low": low, "high": high}
    key = f"compared/{c.id}/{rung}/paired"
    gain, low, high = (Number(value, "+.4f", f"{key}/{name}", trials) for name, value in values.items())
    span: Line = (low, " to ", high) if high.value is not None else (low,)
    if span[1:] and len(shared) < len(runs):
        span = (*span, ", ", Number(len(shared), "d", f"{key}/n", trials), " pairs")
    return (gain,), span


def _verdict(view: StudyView, c: Candidate, rung: int) -> Line:
    if c.arm != LISTED_ARM:
        return (Chip(c.arm),)
    promoted = [e["reason"] for e in view.promoted if (e["candidate"], e["rung"]) == (c.id, rung)]
    standing = (promoted or ["open"])[-1] if rung else verdict_name(c.last) if c.last else str(c.status)
    return (Chip(standing), *(f" {t.failure}" for t in view.failures(c.id, rung)[:1]))
