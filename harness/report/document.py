"""The report as a tree: what it says, apart from how it looks. Built once, rendered twice, audited as it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

MISSING = "–"
LONGEST_TEXT = 400  # characters of a stranger's text that are shown
LONGEST_CELL = 140  # in a table


@dataclass(frozen=True)
class Number:
    """A shown number: what a second calculation knows it by, and the trials it comes from.

    `value` None is missing and shows as a dash, never as 0.
    """

    value: float | int | None
    form: str
    key: str
    trials: tuple[str, ...] = ()

    def __str__(self) -> str:
        return MISSING if self.value is None else format(self.value, self.form)


@dataclass(frozen=True)
class Code:
    """Text that a reader may copy: an id, a setting, a command."""

    text: str


@dataclass(frozen=True)
class Chip:
    """A verdict or a state."""

    text: str


Part = str | Number | Code | Chip
Line = tuple[Part, ...]


@dataclass(frozen=True)
class Prose:
    line: Line


@dataclass(frozen=True)
class Bullets:
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Table:
    columns: tuple[str, ...]
    rows: tuple[tuple[Line, ...], ...]

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Per column: whether each of its cells starts with a number."""
        return tuple(
            all(isinstance(row[i][0], Number) for row in self.rows) for i in range(len(self.columns))
        )


@dataclass(frozen=True)
class Dot:
    """One trial in the progress figure, at its place in the order of finishing."""

    x: int
    y: Number  # bits per byte; missing: it failed
    arm: str
    kept: bool
    trial: str


@dataclass(frozen=True)
class Progress:
    dots: tuple[Dot, ...]
    steps: tuple[tuple[int, Number], ...]  # (x, mean of the incumbent from there on)


@dataclass(frozen=True)
class Paired:
    """Differences per seed (positive: the candidate is better), the estimate and its interval."""

    gains: tuple[Number, ...]
    delta: Number
    low: Number
    high: Number


@dataclass(frozen=True)
class Figure:
    name: str  # file name without its ending
    alt: str
    data: Progress | Paired


@dataclass(frozen=True)
class Section:
    title: str
    blocks: tuple[Prose | Bullets | Table | Figure | Section, ...]
    folded: bool = False


@dataclass(frozen=True)
class Winner:
    """A confirmed candidate as a file: comment lines, then its settings."""

    candidate: str
    comments: tuple[str, ...]
    settings: tuple[tuple[str, bool | int | float | str], ...]


@dataclass(frozen=True)
class Report:
    study: str
    question: str
    outcome: Line
    facts: tuple[Line, ...]
    sections: tuple[Section, ...]
    winners: tuple[Winner, ...]


def walk(node: Any, kind: type) -> Iterator[Any]:
    """Every `kind` in the tree, in the order in which it is shown."""
    if isinstance(node, kind):
        yield node
    if is_dataclass(node):
        node = tuple(getattr(node, f.name) for f in fields(node))
    if isinstance(node, tuple):
        for child in node:
            yield from walk(child, kind)


def plain(text: str, longest: int = LONGEST_TEXT) -> str:
    """A stranger's text on one line: no line breaks, no control or direction characters, not endless."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= longest else text[: longest - 1] + "…"


def compact(trials: Iterable[str]) -> list[str]:
    """Trial ids with runs of seeds joined: `ab12-r0-s10000…10007`, `cd34-r0-s10000`."""
    groups: list[list[Any]] = []  # [candidate and rung, first seed, last seed]
    for trial in trials:
        stem, seed = trial.rsplit("-s", 1)
        if groups and groups[-1][0] == stem and int(seed) == groups[-1][2] + 1:
            groups[-1][2] += 1
        else:
            groups.append([stem, int(seed), int(seed)])
    return [f"{s}-s{a}" + (f"…{b}" if b > a else "") for s, a, b in groups]


def join(lines: Iterable[Line], between: str) -> Line:
    joined: list[Part] = []
    for line in lines:
        joined += [between, *line] if joined else line
    return tuple(joined)
