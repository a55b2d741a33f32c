"""What to run next: pure functions from the ledger's view to trials, the most urgent first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from harness.promote import SPLIT as PROMOTION_SPLIT
from harness.promote import promotion_runs
from harness.records import Candidate, Status, TrialState, seed_of, trial_id
from harness.stats import audit_control_seeds, control_seeds, control_size, needed_seeds
from harness.view import StudyView


@dataclass(frozen=True)
class Work:
    """A training to do, or (train false) a finished one to judge on one more split."""

    candidate: str
    rung: int
    seed: int
    purpose: str  # source | control | look | audit | promotion
    splits: tuple[str, ...]
    train: bool = True

    @property
    def trial(self) -> str:
        return trial_id(self.candidate, self.rung, self.seed)


def pending(view: StudyView, promoting: bool) -> Iterator[Work]:
    """Everything that could start now, in order of urgency; running trials are not in it.

    Control first, then audits, then the deepest looks. Promotions run once exploring is over. Where the study
    trains a source, all other work of a rung waits for the rung's one.
    """
    waiting: set[int] = set()
    for work in _wanted(view, promoting):
        source = view.trials.get(view.source_trial(work.rung))
        if view.source is None or (source and source.state == TrialState.COMPLETE):
            yield work
        elif work.rung not in waiting:
            waiting.add(work.rung)
            seeds = [seed_of(work.rung, 0)]
            yield from _missing(view, view.source, work.rung, seeds, "source", ("val", "audit"))


def _wanted(view: StudyView, promoting: bool) -> Iterator[Work]:
    yield from _control(view)
    candidates = sorted(view.open.values(), key=_urgency)
    for candidate in candidates:
        if candidate.status == Status.AUDIT:
            yield from _audit(view, candidate)
    for candidate in candidates:
        if candidate.status == Status.OPEN:
            seeds, _ = needed_seeds(view, candidate)
            yield from _missing(view, candidate.id, 0, seeds, "look", ("val",))
    if promoting:
        for candidate_id, rung, seeds in promotion_runs(view):
            yield from _missing(view, candidate_id, rung, seeds, "promotion", ("val", PROMOTION_SPLIT))


def _urgency(candidate: Candidate) -> tuple[int, int]:
    return (-(candidate.last["n"] if candidate.last else 0), candidate.order)


def _control(view: StudyView) -> Iterator[Work]:
    """The incumbent's first runs, before anything else; then one more per so many decisions."""
    first = view.space.rungs[0].seeds
    extra = control_size(view) - len(view.control(view.incumbent, 0, "val"))
    known = len(view.scores(view.incumbent, 0, "val"))
    seeds = control_seeds(view, max(first, known + extra))
    yield from _missing(view, view.incumbent, 0, seeds, "control", ("val",))


def _audit(view: StudyView, candidate: Candidate) -> Iterator[Work]:
    """The candidate's fresh seeds and the control's, each judged on the audit split."""
    seeds, _ = needed_seeds(view, candidate)
    yield from _missing(view, candidate.id, 0, seeds, "audit", ("val", "audit"))
    control = audit_control_seeds(view, candidate, seeds)
    yield from _missing(view, view.incumbent, 0, control, "control", ("val", "audit"))


def _missing(
    view: StudyView, candidate: str, rung: int, seeds: list[int], purpose: str, splits: tuple[str, ...]
) -> Iterator[Work]:
    for seed in seeds:
        trial = view.trials.get(trial_id(candidate, rung, seed))
        if trial is None or (trial.state == TrialState.FAIL and not trial.over):
            yield Work(candidate, rung, seed, purpose, splits)
        elif trial.state == TrialState.COMPLETE:
            left = tuple(s for s in splits if s not in trial.scores)
            if left:
                yield Work(candidate, rung, seed, purpose, left, train=False)


def is_done_with(view: StudyView, trial: str) -> bool:
    """Whether nothing will be judged again from the trial's weights."""
    known = view.trials.get(trial)
    if known is None or not known.over or known.candidate == view.source:
        return False
    return known.rung > 0 or not (known.candidate == view.incumbent or known.candidate in view.open)
