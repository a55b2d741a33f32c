"""What is left of the night: time, trainings, GPU-hours, and what promotion needs of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable

from harness.promote import expected_rungs
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

    def expected_seconds(self, rung: int) -> float:
        """Median of the rung's trials; before there is one, the first rung's scaled by FLOPs."""
        if seconds := self._view.seconds_at[rung]:
            return statistics.median(seconds[-RECENT:])
        if rung == 0 or not self._view.seconds_at[0]:
            return 0.0
        facts = self._view.candidates[self._view.baseline].proposed["facts_by_rung"]
        flops = [f["flops_per_token"] * r.tokens for f, r in zip(facts, self._view.space.rungs, strict=True)]
        return statistics.median(self._view.seconds_at[0][-RECENT:]) * flops[rung] / flops[0]

    def refusal(self, work: Work, flying: Iterable[Work]) -> tuple[str, str] | None:
        """Why the night cannot afford this trial beside those under way: (reason, detail), or None."""
        view, budget = self._view, self.budget
        expected = self.expected_seconds(work.rung) if work.train else 0.0
        if work.train and view.num_started >= budget.trials:
            return "budget-trials", f"{view.num_started} of {budget.trials} trainings"
        if expected > self.seconds_left():
            return "budget-hours", f"{self.elapsed_seconds() / 3600:.2f} of {budget.hours:g} h"
        if budget.gpu_hours is not None:
            used = (view.gpu_seconds + sum(self._gpu_seconds(w.rung) for w in (*flying, work))) / 3600
            if used > budget.gpu_hours:
                return "budget-gpu-hours", f"{used:.2f} of {budget.gpu_hours:g} GPU-hours"
        return None

    def seconds_left(self) -> float:
        return self.budget.hours * 3600 - self.elapsed_seconds()

    def must_promote(self, slots: list[int]) -> bool:
        """Whether the promotions that are due would no longer fit if exploring went on."""
        due = expected_rungs(self._view)
        if not due:
            return False
        need = sum(self.expected_seconds(rung) / slots[rung] for rung in due)
        need += sum(self.expected_seconds(rung) for rung in set(due))  # the last trial of a rung runs alone
        if self.seconds_left() <= RESERVE_MARGIN * need:
            return True
        if self.budget.gpu_hours is not None:
            need = RESERVE_MARGIN * sum(map(self._gpu_seconds, due))
            if need and self.budget.gpu_hours * 3600 - self._view.gpu_seconds <= need:
                return True
        return self.budget.trials - self._view.num_started <= len(due)

    def _gpu_seconds(self, rung: int) -> float:
        return self.expected_seconds(rung) * self._view.space.rungs[rung].gpus
