"""What is left of the night: time, trainings, GPU-hours, and what promotion needs of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable

from harness.promote import expected_runs
from harness.schedule import Work
from harness.space import Budget
from harness.view import StudyView

RESERVE_MARGIN = 1.3  # promotion is begun while this multiple of its expected time is left
RECENT = 64  # trials that an expectation is taken from


class Purse:
    """One session's budget; earlier sessions of the study have used part of it."""

    def __init__(self, view: StudyView, budget: Budget):
        self.budget = budget
        self._view = view
        self._before_seconds, self._started = view.elapsed_seconds(), time.monotonic()

    def elapsed_seconds(self) -> float:
        return self._before_seconds + time.monotonic() - self._started

    def expected_seconds(self, rung: int, candidate: str) -> float:
        """Median of the rung's trials, or of the first rung's before there is one, scaled by FLOPs; 0 if unknown."""
        view = self._view
        measured = next((r for r in (rung, 0) if view.seconds_at[r]), None)
        if measured is None:
            return 0.0
        seconds = statistics.median(view.seconds_at[measured][-RECENT:])
        return seconds * view.flops(candidate, rung) / view.flops(view.baseline, measured)

    def refusal(self, work: Work, flying: Iterable[Work]) -> tuple[str, str] | None:
        """Why the night cannot afford this trial beside those under way: (reason, detail), or None."""
        view, budget = self._view, self.budget
        expected = self.expected_seconds(work.rung, work.candidate) if work.train else 0.0
        if work.train and view.num_started >= budget.trials:
            return "budget-trials", f"{view.num_started} of {budget.trials} trainings"
        if expected > self.seconds_left():
            return "budget-hours", f"{self.elapsed_seconds() / 3600:.2f} of {budget.hours:g} h"
        if budget.gpu_hours is not None:
            soon = sum(self._gpu_seconds(w.rung, w.candidate) for w in (*flying, work))
            used = (view.gpu_seconds + soon) / 3600
            if used > budget.gpu_hours:
                return "budget-gpu-hours", f"{used:.2f} of {budget.gpu_hours:g} GPU-hours"
        return None

    def seconds_left(self) -> float:
        return self.budget.hours * 3600 - self.elapsed_seconds()

    def must_promote(self, slots: list[int]) -> bool:
        """Whether the promotions that are due would no longer fit if exploring went on."""
        due = expected_runs(self._view)
        if not due:
            return False
        need = sum(self.expected_seconds(*run) / slots[run[0]] for run in due)
        alone = {(rung, c if c == self._view.source else self._view.baseline) for rung, c in due}
        need += sum(self.expected_seconds(*run) for run in alone)  # a rung's source, and its last trial
        if self.seconds_left() <= RESERVE_MARGIN * need:
            return True
        if self.budget.gpu_hours is not None:
            need = RESERVE_MARGIN * sum(self._gpu_seconds(*run) for run in due)
            if need and self.budget.gpu_hours * 3600 - self._view.gpu_seconds <= need:
                return True
        return self.budget.trials - self._view.num_started <= len(due)

    def _gpu_seconds(self, rung: int, candidate: str) -> float:
        return self.expected_seconds(rung, candidate) * self._view.space.rungs[rung].gpus
