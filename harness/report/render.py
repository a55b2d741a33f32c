"""A report as Markdown, as one self-contained page and as settings files. Adds no number of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path

from harness.report.document import (
    Bullets,
    Chip,
    Code,
    Figure,
    Line,
    Number,
    Part,
    Prose,
    Report,
    Section,
    Table,
    Winner,
    compact,
    walk,
)

TEMPLATE = Path(__file__).with_name("report.html")
_MARKUP = re.compile(r"([\\`*_<>\[\]|&~$#])")


def markdown(report: Report) -> str:
    head = [f"# {_escape(report.study)}", f"{_escape(report.question)}", f"**{_line(report.outcome)}**"]
    blocks = [head[0], *(b for b in head[1:] if b), _bullets(report.facts)]
    for node in report.sections:
        blocks += section(node, 2)
    return "\n\n".join(blocks) + "\n"


def section(node: Section, level: int) -> list[str]:
    """A section as Markdown blocks; its title is a heading of that level."""
    blocks = ["#" * level + " " + _escape(node.title)]
    for block in node.blocks:
        match block:
            case Section():
                blocks += section(block, level + 1)
            case Prose(line):
                blocks.append(_line(line))
            case Bullets(lines):
                blocks.append(_bullets(lines))
            case Table():
                blocks.append(_table(block))
            case Figure():
                blocks.append(f"![{_escape(block.alt)}](figures/{block.name}.svg)")
    return blocks


def _bullets(lines: tuple[Line, ...]) -> str:
    return "\n".join("- " + _line(line) for line in lines)


def _table(table: Table) -> str:
    rows = [
        [_escape(c) for c in table.columns],
        ["--:" if numeric else "---" for numeric in table.numeric],
        *([_line(cell) for cell in row] for row in table.rows),
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _line(line: Line) -> str:
    return "".join(map(_part, line)).strip()


def _part(part: Part) -> str:
    match part:
        case Number():
            return str(part)
        case Code(text):
            return "`" + " ".join(text.split()).replace("`", "'").replace("|", "\\|") + "`"
        case Chip(text):
            return f"*{_escape(text)}*"
        case _:
            return _escape(part)


def _escape(text: str) -> str:
    """Text as Markdown shows it letter by letter, also inside a table."""
    return _MARKUP.sub(r"\\\1", " ".join(text.split()) if "\n" in text else text)


def html(report: Report, figures: dict[str, str]) -> str:
    """One page without a reference to anything outside it. `figures`: name -> SVG for inlining."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "kind": lambda node: type(node).__name__,
        "slug": lambda text: re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-"),
        "ids": compact,
        "exact": lambda value: "" if value is None else repr(value),
    }
    drawn = {name: Markup(text) for name, text in figures.items()}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(report=report, drawn=drawn)


def drawn(report: Report) -> dict[str, str]:
    """Name of each figure -> its SVG document."""
    from harness.report.figures import svg

    return {figure.name: svg(figure) for figure in walk(report, Figure)}


def toml(winner: Winner) -> str:
    lines = [f"# {comment}" for comment in winner.comments]
    lines += ["", "[baseline]", *(f"{key} = {_toml_value(value)}" for key, value in winner.settings)]
    return "\n".join(lines) + "\n"


def _toml_value(value: bool | int | float | str) -> str:
    if isinstance(value, str):
        return json.dumps(value).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)
