"""The nouns of a study: trials and candidates, their states and names."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from harness.ledger import Event
from harness.space import Settings

BASELINE_ARM = "baseline"
PLACEBO_ARM = "placebo"
LISTED_ARM = "listed"  # designs that the search-space file names
SOURCE_ARM = "source"  # the run that all others go on from
MAX_LOSSES = 3  # a trial whose worker died under it this often is not tried again


class TrialState(StrEnum):
    WAITING = "WAITING"
    RUNNING = "RUNNING"
    COMPLETE = "COMPLETE"
    FAIL = "FAIL"


class FailureKind(StrEnum):
    CONFIG = "config"
    CRASH = "crash"
    OOM = "oom"
    TIMEOUT = "timeout"
    DIVERGED = "diverged"
    COLLAPSED = "collapsed"
    CHEAT = "cheat"
    LOST = "lost"


class Status(StrEnum):
    """Where a candidate stands at the first rung."""

    OPEN = "open"  # between two looks
    AUDIT = "audit"  # provisionally kept, being audited
    KEPT = "kept"
    DISCARDED = "discarded"
    NO_EFFECT = "no-effect"
    SOURCE = "source"  # trained for the others to go on from, never decided on


@dataclass
class Trial:
    """One training run: candidate x rung x seed."""

    id: str
    candidate: str
    rung: int
    seed: int
    purpose: str  # source | control | look | audit | promotion
    state: TrialState = TrialState.RUNNING
    failure: FailureKind | None = None
    detail: str = ""
    started: datetime | None = None  # the last attempt
    seconds: float = 0.0  # wall time of all its attempts
    losses: int = 0  # how often its worker died under it
    scores: dict[str, float] = field(default_factory=dict)  # split -> bits per byte
    finished: Event = field(default_factory=dict)  # the `finished` record: seconds, tokens, health, ...

    @property
    def over(self) -> bool:
        """Nothing more will come of it: complete, failed, or lost too often."""
        if self.state == TrialState.FAIL and self.failure == FailureKind.LOST:
            return self.losses >= MAX_LOSSES
        return self.state in (TrialState.COMPLETE, TrialState.FAIL)


@dataclass
class Candidate:
    """A valid, deduplicated proposal: resolved settings and trainer source."""

    id: str
    arm: str
    order: int
    settings: Settings
    parent: str | None
    against: str | None  # the incumbent when it was proposed
    placebo: bool = False
    proposed: Event = field(default_factory=dict)  # the `proposed` record: hypothesis, counts, commit, ...
    status: Status = Status.OPEN
    verdicts: list[Event] = field(default_factory=list)
    trials: list[str] = field(default_factory=list)

    @property
    def last(self) -> Event | None:
        return self.verdicts[-1] if self.verdicts else None

    @property
    def name(self) -> str:
        """What a listed design is called; empty for what the night thought of."""
        return self.proposed.get("name", "")


def trial_id(candidate: str, rung: int, seed: int) -> str:
    return f"{candidate}-r{rung}-s{seed}"


def seed_of(rung: int, index: int) -> int:
    """The rung's ordered seed list, without end: candidates take seeds from its head and so pair up."""
    return 10_000 * (rung + 1) + index
