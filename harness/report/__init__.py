"""The morning report: what the ledger says, for a person with a quarter of an hour.

harness report STUDY
"""

from __future__ import annotations

from collections.abc import Iterator
from difflib import SequenceMatcher
from itertools import takewhile, zip_longest
from pathlib import Path

from harness.errors import UserError
from harness.ledger import Event, write_atomic
from harness.report import accounts, comparison, findings, measures, render
from harness.report.document import Chip, Code, Line, Report
from harness.report.evidence import recheck
from harness.view import StudyView


def build(view: StudyView) -> Report:
    """Everything the report shows, as plain data; each number names the trials it comes from.

    Raises UserError for a ledger without a baseline.
    """
    if not view.incumbents:
        raise UserError(
            "the ledger holds no baseline yet, so there is nothing to report; start the search first"
        )
    ended = view.sessions[-1] if view.sessions[-1]["event"] == "stopped" else None
    return Report(
        study=view.opened["study"],
        question=view.space.question,
        outcome=findings.outcome(view, running=ended is None),
        facts=_facts(view, ended),
        sections=(
            *comparison.compared(view),
            findings.confirmed(view),
            findings.promising(view),
            measures.noise_floor(view),
            measures.progress(view),
            measures.leaderboards(view),
            accounts.arms(view),
            accounts.failures(view),
            accounts.cost(view),
            accounts.reproduce(view),
            accounts.every_trial(view),
        ),
        winners=findings.winners(view),
    )


def _facts(view: StudyView, ended: Event | None) -> tuple[Line, ...]:
    state: Line = (Chip("running"), " no end is recorded: it still runs, or it was cut off")
    if ended:
        detail = findings.plain(ended.get("detail") or "")
        state = (Chip("stopped"), f" {ended['reason']}", f": {detail}" if detail else "")
    records = [*view.sessions, *(t.finished for t in view.trials.values() if t.finished)]
    first, last = view.opened["t"], max(e["t"] for e in records)
    return (
        state,
        (f"{first[:16].replace('T', ' ')} to {last[:16].replace('T', ' ')} UTC",),
        ("Judge ", Code(view.opened["judge_id"]), "; scores are bits per byte, lower is better"),
    )


def files(view: StudyView) -> dict[str, str]:
    """Path inside the report's folder -> text, for every file of the report."""
    from harness.report.figures import themed

    report = build(view)
    drawn = render.drawn(report)
    return {
        "report.md": render.markdown(report),
        "index.html": render.html(report, {name: themed(svg, name) for name, svg in drawn.items()}),
        **{f"figures/{name}.svg": svg for name, svg in drawn.items()},
        **{f"winners/{winner.candidate}.toml": render.toml(winner) for winner in report.winners},
    }


def write_report(view: StudyView, folder: Path) -> list[Path]:
    """Writes the report's files, each whole or not at all; the same ledger gives the same bytes."""
    written = []
    for name, text in files(view).items():
        write_atomic(folder / name, text)
        written.append(folder / name)
    return written


def audit(view: StudyView, folder: Path) -> list[str]:
    """One line per place where a file of the report and the ledger disagree; empty when all is borne out.

    Two paths: the files against a fresh rendering, and each number against the records and plain formulas.
    """
    wanted = files(view)
    problems = [
        f"{name}: stands there, the ledger gives no such file"
        for name in sorted(_claims(folder) - wanted.keys())
    ]
    for name, text in wanted.items():
        path = folder / name
        if not path.exists():
            problems.append(f"{name}: missing, the ledger gives one; write the report again")
            continue
        stands = path.read_bytes().decode("utf-8", errors="replace")
        problems += [f"{name}:{where}" for where in _disagreements(stands, text)]
    return problems + recheck(view, build(view))


def _claims(folder: Path) -> set[str]:
    return {
        str(p.relative_to(folder)) for p in (*folder.glob("winners/*.toml"), *folder.glob("figures/*.svg"))
    }


def _disagreements(stands: str, wanted: str) -> Iterator[str]:
    """Where two texts differ: line in the first, what stands there and what is wanted, around the first difference."""
    if stands == wanted:
        return
    have, want = stands.split("\n"), wanted.split("\n")
    for tag, a, b, c, d in SequenceMatcher(None, have, want, autojunk=False).get_opcodes():
        if tag == "equal":
            continue
        for i, (old, new) in enumerate(zip_longest(have[a:b], want[c:d])):
            same = sum(
                1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(old or "", new or "", strict=False))
            )
            start = max(0, same - 30)
            excerpts = ("nothing" if t is None else repr(t[start : start + 70]) for t in (old, new))
            yield "{}: {} stands there, the ledger gives {}".format(a + i + 1, *excerpts)


def against(view: StudyView, other: StudyView) -> str:
    """Two studies side by side, as a Markdown section.

    Raises UserError when they were scored by different judges.
    """
    names, judges = zip(*((v.opened["study"], v.opened["judge_id"]) for v in (view, other)), strict=True)
    if judges[0] != judges[1]:
        raise UserError(
            f"{names[0]} has judge {judges[0]}, {names[1]} has judge {judges[1]}: scores are not comparable; "
            "compare studies of one judge"
        )
    return "\n\n".join(render.section(findings.comparison(view, other), 2)) + "\n"
