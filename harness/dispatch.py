"""What a dispatcher drives, and the plainest one: one trial after the other in this process."""

from __future__ import annotations

import time
from typing import Protocol

from harness.trial import TrialRunner, TrialSpec

IDLE_SECONDS = 0.1


class Finished(Exception):
    """No more work: every trial that was handed out is back and the reason is in the ledger."""


class Source(Protocol):
    """The night's search, as a dispatcher sees it. Called from one thread."""

    slots: list[int]  # trials that can run beside each other, per rung

    def next_task(self) -> TrialSpec | None:
        """The next trial to run; None while there is nothing to start. Raises Finished."""

    def on_result(self, spec: TrialSpec, outcome: dict) -> None:
        """A worker brought a trial back."""

    def lost(self, spec: TrialSpec, detail: str) -> None:
        """A worker died under a trial."""


def run_inline(source: Source) -> None:
    """For tests and debugging."""
    source.slots = [1] * len(source.slots)
    runner = TrialRunner()
    try:
        while True:
            spec = source.next_task()
            if spec is None:
                time.sleep(IDLE_SECONDS)  # a proposer is still thinking
                continue
            source.on_result(spec, runner.run(spec))
    except Finished:
        return
    finally:
        runner.close()
