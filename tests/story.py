"""Ledger records with a clock, told in a few words, for tests of what reads them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from harness.ledger import Event
from harness.records import BASELINE_ARM, trial_id
from harness.view import StudyView

SPACE = {
    "name": "view",
    "baseline": {"x": 1.0},
    "params": {"x": {"kind": "float", "low": 0.0, "high": 2.0}},
    "rungs": [{"depth": 1, "tokens": 10, "seeds": 2}, {"depth": 2, "tokens": 20, "seeds": 2}],
}
BASE = "base"
START = datetime(2026, 1, 1, tzinfo=UTC)


class Story:
    """Events with a clock; each method adds one and gives the story back."""

    def __init__(self, space: dict[str, Any] = SPACE) -> None:
        self.space = space
        self.events: list[Event] = []
        self.seconds = 0.0

    def tell(self, name: str, after_seconds: float = 1.0, **more: Any) -> Story:
        self.seconds += after_seconds
        t = (START + timedelta(seconds=self.seconds)).isoformat()
        self.events.append({"v": 1, "t": t, "event": name, **more})
        return self

    def opened(self, after_seconds: float = 1.0) -> Story:
        return self.tell("opened", after_seconds, space=self.space, study="view")

    def proposed(self, candidate: str, arm: str = "random", **more: Any) -> Story:
        record = {"candidate": candidate, "arm": arm, "settings": self.space["baseline"]}
        record |= {"parent": BASE, "against": BASE}
        return self.tell("proposed", **{**record, **more})

    def begun(self) -> Story:
        return self.opened().proposed(BASE, BASELINE_ARM, parent=None, against=None)

    def started(self, candidate: str, seed: int, rung: int = 0) -> Story:
        trial = trial_id(candidate, rung, seed)
        return self.tell(
            "started", trial=trial, candidate=candidate, rung=rung, seed=seed, purpose="look", attempt=1
        )

    def finished(self, candidate: str, seed: int, failure: str | None = None, rung: int = 0) -> Story:
        state = "FAIL" if failure else "COMPLETE"
        seconds = None if failure == "lost" else 5.0
        trial = trial_id(candidate, rung, seed)
        return self.tell("finished", trial=trial, state=state, failure=failure, detail="why", seconds=seconds)

    def scored(self, candidate: str, seed: int, bpb: float, rung: int = 0, split: str = "val") -> Story:
        self.started(candidate, seed, rung)
        self.tell("judged", trial=trial_id(candidate, rung, seed), split=split, bpb=bpb)
        return self.finished(candidate, seed, rung=rung)

    def verdict(self, candidate: str, verdict: str, provisional: bool = False) -> Story:
        return self.tell("verdict", candidate=candidate, verdict=verdict, provisional=provisional, n=1)

    def spend(self, call: str, usd: float, phase: str) -> Story:
        return self.tell("spend", call=call, usd=usd, phase=phase)

    def view(self) -> StudyView:
        return StudyView(self.events)
