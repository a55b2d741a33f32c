"""Where a study stands, from its ledger alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from harness.records import PLACEBO_ARM, Status, TrialState
from harness.study import StudyPaths, load_study
from harness.view import StudyView


@dataclass(frozen=True)
class StudyStatus:
    study: str
    state: str
    elapsed_hours: float
    budget_hours: float
    trials: dict[str, int]
    failures: dict[str, int]
    candidates: dict[str, int]
    spent_usd: float
    budget_usd: float
    baseline_bpb: float | None
    incumbent: str
    incumbent_bpb: float | None
    rejected: int
    placebos: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        counts = ", ".join(f"{n} {name}" for name, n in self.trials.items()) or "none yet"
        standing = ", ".join(f"{n} {name}" for name, n in self.candidates.items()) or "none yet"
        failures = ", ".join(f"{n} {kind}" for kind, n in self.failures.items())
        lines = [
            f"{self.study}: {self.state}, {self.elapsed_hours:.2f} of {self.budget_hours:g} h",
            f"  trials      {counts}" + (f" ({failures})" if failures else ""),
            f"  candidates  {standing}; {self.placebos} placebos, {self.rejected} proposals refused",
            f"  baseline    {_bpb(self.baseline_bpb)} val bpb",
            f"  incumbent   {_bpb(self.incumbent_bpb)} val bpb  {self.incumbent}",
            f"  spent       {self.spent_usd:.2f} of {self.budget_usd:g} USD",
        ]
        return "\n".join(lines)


def status_of(study: str) -> StudyStatus:
    paths, _, view = load_study(study)
    budget = next(e for e in reversed(view.sessions) if e["event"] == "opened")["budget"]
    proposed = [c for c in view.candidates.values() if c.id != view.baseline and not c.placebo]
    failed = [t for t in view.trials.values() if t.state == TrialState.FAIL]
    return StudyStatus(
        study=study,
        state=_state(paths, view),
        elapsed_hours=view.elapsed_seconds() / 3600,
        budget_hours=budget["hours"],
        trials=dict(Counter(t.state.value for t in view.trials.values())),
        failures=dict(Counter(t.failure.value for t in failed)),
        candidates=dict(Counter(_standing(c.status) for c in proposed)),
        spent_usd=view.spent_usd(),
        budget_usd=budget["usd"],
        baseline_bpb=_mean(view, view.baseline),
        incumbent=view.incumbent,
        incumbent_bpb=_mean(view, view.incumbent),
        rejected=len(view.rejected),
        placebos=view.asked[PLACEBO_ARM],
    )


def _state(paths: StudyPaths, view: StudyView) -> str:
    from filelock import FileLock, Timeout

    lock = FileLock(paths.folder / "driver.lock")
    try:
        with lock.acquire(timeout=0):
            pass
    except Timeout:
        return "running"
    last = view.sessions[-1]
    return f"stopped ({last['reason']})" if last["event"] == "stopped" else "interrupted: go on with --resume"


def _standing(status: Status) -> str:
    return "undecided" if status in (Status.OPEN, Status.AUDIT) else status.value


def _mean(view: StudyView, candidate: str) -> float | None:
    scores = view.scores(candidate, 0, "val")
    return sum(scores.values()) / len(scores) if scores else None


def _bpb(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
