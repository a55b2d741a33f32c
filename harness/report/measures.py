"""What the night measured: noise floor, progress, leaderboards."""

from __future__ import annotations

import math
from collections.abc import Iterable

from harness.records import Candidate, Status, Trial, TrialState
from harness.report.document import Chip, Dot, Figure, Line, Number, Progress, Prose, Section, Table
from harness.report.quantities import called, changes, known_noise, mean, score, t_half_width, verdict_name
from harness.stats import Noise, difference
from harness.view import StudyView

LEADERS = 15
FEWEST_AUDITS = 10  # below, the false-discovery estimate from failed audits says nothing
AUDIT_MISS, AUDIT_CHANCE = 0.2, 0.1  # share of true gains an audit drops, of null ones it passes


def noise_floor(view: StudyView) -> Section:
    rows = []
    for r, rung in enumerate(view.space.rungs):
        noise = known_noise(view, r)
        if noise is None:
            continue
        rows.append((*_control_cells(view, r, rung.depth), *_pooled_cells(r, noise)))
    if not rows:
        return Section("Noise floor", (Prose(("Not measured: no setting has two complete runs.",)),))
    columns = (
        "rung",
        "depth",
        "baseline runs",
        "mean bpb",
        "sd",
        "sd, 95 %",
        "pooled sd",
        "df",
        "seed correlation",
    )
    blocks = [Table(columns, tuple(rows)), Prose(_smallest(view)), Prose(_false_keeps(view))]
    note = "How far two runs of the same settings lie apart when only the seed differs, in bits per byte."
    return Section("Noise floor", (Prose((note,)), *blocks))


def _control_cells(view: StudyView, rung: int, depth: int) -> tuple[Line, ...]:
    from scipy.stats import chi2

    runs = view.control(view.baseline, rung, "val")
    trials = tuple(view.control_trials(view.baseline, rung, runs))

    def number(what: str, form: str, value: float | int | None) -> Number:
        return Number(value, form, f"control/{rung}/{what}", trials)

    n, sd, low, high = len(runs), None, None, None
    if n >= 2:
        center = sum(runs.values()) / n
        squares = sum((v - center) ** 2 for v in runs.values())
        sd = math.sqrt(squares / (n - 1))
        low, high = (math.sqrt(squares / float(chi2.ppf(q, n - 1))) for q in (0.975, 0.025))
    span = (number("low", ".4f", low), " to ", number("high", ".4f", high))
    return (
        (str(rung),),
        (str(depth),),
        (number("n", "d", n),),
        (mean(view, view.baseline, rung),),
        (number("sd", ".4f", sd),),
        span,
    )


def _pooled_cells(rung: int, noise: Noise) -> tuple[Line, ...]:
    return tuple(
        (Number(value, form, f"noise/{rung}/{name}"),)
        for name, form, value in (
            ("sigma", ".4f", noise.sigma),
            ("df", "d", noise.df),
            ("rho", ".2f", noise.rho),
        )
    )


def _smallest(view: StudyView) -> Line:
    """The measured gain that just reaches the keep bound, at the first look and at the last."""
    rule, noise = view.space.decision, known_noise(view, 0)
    m = len(view.control(view.incumbent, 0, "val"))
    if noise is None or not m:
        return ("The smallest gain a decision could see: not known.",)

    def needed(i: int) -> Number:
        n = rule.looks[i]
        se = math.sqrt(noise.variance * ((1 - noise.rho**2) / n + (1 - noise.rho) ** 2 / m))
        return Number(rule.keep[i] * (1 + 1.5 / noise.df) * se, ".4f", f"needed/{i}")

    last = len(rule.looks) - 1
    line: Line = (
        "To go to an audit a change must show a gain of ",
        needed(0),
        f" bpb at n = {rule.looks[0]}",
    )
    if last:
        line += (", or of ", needed(last), f" bpb at n = {rule.looks[last]}")
    return (*line, "; smaller effects stay unseen.")


def _false_keeps(view: StudyView) -> Line:
    tried = [c for c in view.candidates.values() if c.placebo and c.verdicts]
    kept = sum(c.status == Status.KEPT for c in tried)
    audits = [c.last["verdict"] for c in view.candidates.values() if c.last and c.last["stage"] == "audit"]
    failed = audits.count("discard")
    line: Line = (
        "Placebos (the incumbent in disguise) tried: ",
        Number(len(tried), "d", "placebos/tried"),
        ", kept: ",
        Number(kept, "d", "placebos/kept"),
        ". Audits decided: ",
        Number(len(audits), "d", "audits/decided"),
        ", failed: ",
        Number(failed, "d", "audits/failed"),
        ". ",
    )
    rate = None
    if len(audits) >= FEWEST_AUDITS and failed < len(audits):
        false = max(0.0, (failed - AUDIT_MISS * len(audits)) / (1 - AUDIT_CHANCE - AUDIT_MISS))
        rate = AUDIT_CHANCE * false / (len(audits) - failed)
    share = Number(rate, ".1%", "audits/false_share")
    tail = "." if rate is not None else f" (needs {FEWEST_AUDITS} audits and a keep)."
    return (*line, "Estimated share of false keeps from failed audits: ", share, tail)


def finish_order(view: StudyView, rung: int) -> list[Trial]:
    done = [t for t in view.trials.values() if t.rung == rung and t.finished]
    return sorted(done, key=lambda t: t.finished["t"])


def progress(view: StudyView) -> Section:
    """Every first-rung trial that has a score on the search split or failed, in the order of finishing."""
    done = [t for t in finish_order(view, 0) if "val" in t.scores or t.state == TrialState.FAIL]
    if not done:
        return Section("Progress", (Prose(("No trial has finished.",)),))
    kept = set(view.incumbents[1:])
    dots = tuple(
        Dot(
            x=i + 1,
            y=score(t, "val"),
            arm=view.candidates[t.candidate].arm,
            kept=t.candidate in kept,
            trial=t.id,
        )
        for i, t in enumerate(done)
    )
    steps = []
    for incumbent in view.standards:
        level = mean(view, incumbent, 0)
        since = view.candidates[incumbent].last
        if level.value is not None:
            x = sum(t.finished["t"] <= since["t"] for t in done) if since else 1
            steps.append((x, level))
    alt = "Score of every training at the first rung in the order of finishing, with the incumbent's mean"
    return Section("Progress", (Figure("progress", alt, Progress(dots, tuple(steps))),))


def leaderboards(view: StudyView) -> Section:
    blocks = []
    for r, rung in enumerate(view.space.rungs):
        ran = (c for c in view.candidates.values() if not c.placebo and c.status != Status.SOURCE)
        means = [(c, mean(view, c.id, r)) for c in ran]
        ranked = sorted((pair for pair in means if pair[1].value is not None), key=lambda pair: pair[1].value)
        if ranked:
            rows = tuple(
                _row(view, r, i, c, score)
                for i, (c, score) in enumerate(ranked, 1)
                if i <= LEADERS or c.id in view.incumbents
            )
            columns = (
                "#",
                "candidate",
                "changes",
                "val bpb ± se",
                "n",
                "gain over the baseline (95 %)",
                "verdict",
            )
            columns += ("params total / active", "train s")
            blocks.append(
                Section(f"Rung {r}: depth {rung.depth}, {rung.tokens:,} tokens", (Table(columns, rows),))
            )
    note = (
        "Sorted by what was measured on the search split: the top is partly luck, most of all with one run. "
        "Only a keep was audited."
    )
    return Section("Leaderboard", (Prose((note,)), *blocks))


def _row(view: StudyView, rung: int, rank: int, c: Candidate, score: Number) -> tuple[Line, ...]:
    noise, runs = known_noise(view, rung), view.control(c.id, rung, "val")
    control = view.control(view.baseline, rung, "val")
    se = noise.sigma / math.sqrt(len(runs)) if noise else None
    trials = [view.trials[t] for t in score.trials]
    seconds = [t.finished["train_seconds"] for t in trials if t.finished.get("train_seconds") is not None]
    gain: Line = (Number(None, "", f"gain/{c.id}/{rung}/delta"),)
    if noise and control and c.id != view.baseline:
        d = difference(control, runs, noise)
        half = t_half_width(noise.df) * d.se
        both = (*score.trials, *view.control_trials(view.baseline, rung, control))
        named = (("delta", d.delta), ("low", d.delta - half), ("high", d.delta + half))
        delta, low, high = (Number(v, "+.4f", f"gain/{c.id}/{rung}/{name}", both) for name, v in named)
        gain = (delta, " (", low, " to ", high, ")")
    verdict = c.arm if c.id == view.baseline else verdict_name(c.last) if c.last else str(c.status)
    key = f"{c.id}/{rung}"
    return (
        (str(rank),),
        called(c),
        changes(view, c, view.baseline) if c.id != view.baseline else ("–",),
        (score, " ± ", Number(se, ".4f", f"se/{key}", score.trials)),
        (Number(len(runs), "d", f"n/{key}", score.trials),),
        gain,
        (Chip(verdict),),
        tuple(_pair(c, rung)),
        (Number(sum(seconds) / len(seconds) if seconds else None, ",.1f", f"train/{key}", score.trials),),
    )


def _pair(c: Candidate, rung: int) -> Iterable[str | Number]:
    facts = c.proposed["facts_by_rung"][rung]
    yield Number(facts["params_total"], ",d", f"facts/{c.id}/{rung}/params_total")
    yield " / "
    yield Number(facts["params_active"], ",d", f"facts/{c.id}/{rung}/params_active")
