"""The report says what the ledger says, the same bytes each time, and the audit finds a single wrong digit.

pytest tests/test_report.py
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from harness.ledger import Event, Ledger
from harness.promote import conclude
from harness.schedule import pending
from harness.stats import decide
from harness.view import BASELINE_ARM, PLACEBO_ARM, StudyView

BASE = {"matrix_lr": 0.02, "router": "linear", "top_k": 2}
SPACE = {
    "name": "night",
    "question": "Which router setting lowers bits per byte at equal tokens?",
    "baseline": BASE,
    "params": {
        "matrix_lr": {"kind": "float", "low": 0.001, "high": 0.1, "log": True},
        "router": {"kind": "categorical", "choices": ["linear", "mlp", "norm"]},
        "top_k": {"kind": "int", "low": 1, "high": 4},
    },
    "rungs": [{"depth": 2, "tokens": 100_000, "seeds": 8}, {"depth": 4, "tokens": 400_000, "seeds": 4}],
}
OPENED = {
    "event": "opened",
    "study": "night",
    "space": SPACE,
    "space_sha256": "5" * 64,
    "commit": "c" * 40,
    "dirty": False,
    "trainer_sha256": "7" * 64,
    "judge_id": "judge-0123456789ab",
    "corpus": {"name": "embedded", "sha256": "e" * 64, "num_documents": 249, "num_bytes": 12_200_000},
    "versions": {"python": "3.11.9", "torch": "2.13.0", "harness": "0.1.0"},
    "machine": {"host": "node", "cpus": 2, "gpu": None, "os": "Linux"},
    "dispatch": "pool",
    "proposers": {"optuna": 0.7, "agent": 0.3},
    "resumed": False,
    "budget": {"hours": 8.0, "trials": 1000, "usd": 5.0, "gpu_hours": None},
}
HOSTILE = "<script>alert(1)</script> | a\nnew # line `x` \u202e [l](http://evil.example) " + "long " * 300


class Night:
    """A study whose trainings are numbers: true means, seed noise, and the real decision code."""

    def __init__(self, folder: Path, sigma: float = 0.004):
        self.ledger = Ledger(folder / "ledger.jsonl")
        self.view = StudyView()
        self.sigma = sigma
        self.levels: dict[str, float] = {}
        self.fails: dict[str, str] = {}
        self.append(OPENED)

    def append(self, *events: Event) -> None:
        self.ledger.append(*events)
        for event in self.ledger.poll():
            self.view.apply(event)

    def propose(self, level: float, arm: str, hypothesis: str = "it helps", fails: str = "", **new) -> str:
        against = self.view.incumbent if self.view.incumbents else None
        placebo = arm == PLACEBO_ARM
        settings = {**(self.view.candidates[against].settings if against else BASE), **new}
        candidate = hashlib.sha256(f"{settings}{len(self.view.candidates)}".encode()).hexdigest()[:8]
        self.levels[candidate] = self.levels[against] if placebo else level
        self.fails[candidate] = fails
        event = {"event": "proposed", "candidate": candidate, "arm": arm, "settings": settings, "changed": {}}
        event |= {"parent": against, "against": against, "hypothesis": hypothesis, "family": "routing"}
        event |= {"facts": {"params_total": 1_234_567, "params_active": 345_678}, "placebo": placebo}
        self.append(event | {"trainer_sha256": "7" * 64, "commit": "c" * 40, "seed_block": 5000 * placebo})
        return candidate

    def run(self, promoting: bool = False) -> None:
        """Trains whatever is due and decides, until nothing is due."""
        for _ in range(10_000):
            work = next(pending(self.view, promoting), None)
            if work is not None:
                self._train(work)
            verdicts = (decide(self.view, c) for c in self.view.open.values())
            verdict = next(filter(None, verdicts), None)
            promoted = conclude(self.view) if promoting else []
            if verdict or promoted:
                self.append(*([verdict] if verdict else promoted))
            elif work is None:
                return

    def _train(self, work) -> None:
        failure = self.fails[work.candidate]
        settings = str(self.view.candidates[work.candidate].settings)
        rng = np.random.default_rng([work.seed, *hashlib.sha256(settings.encode()).digest()])
        level = self.levels[work.candidate] - 0.2 * work.rung
        events: list[Event] = []
        scores = [level + self.sigma * float(x) for x in rng.normal(size=2)]
        if not failure:
            for split in work.splits:
                score = scores[split == "audit"]
                judged = {
                    "event": "judged",
                    "trial": work.trial,
                    "split": split,
                    "bpb": score,
                    "judge_id": "j",
                }
                events.append(judged)
        if work.train:
            started = {
                "event": "started",
                "trial": work.trial,
                "candidate": work.candidate,
                "rung": work.rung,
            }
            started |= {"seed": work.seed, "purpose": work.purpose, "depth": 2, "tokens": 100, "attempt": 1}
            finished = {"event": "finished", "trial": work.trial, "state": "FAIL" if failure else "COMPLETE"}
            finished |= {"failure": failure or None, "detail": HOSTILE if failure else "", "seconds": 31.25}
            finished |= {"train_seconds": 29.5, "device": "cpu", "log": f"trials/{work.trial}/log.txt"}
            events = [started, *events, finished | {"curve": str(scores[0])}]
        self.append(*events)


def spend(night: Night, call: str, phase: str, usd: float) -> None:
    event = {"event": "spend", "call": call, "arm": "agent", "phase": phase, "usd": usd, "model": "m"}
    night.append(event | {"input_tokens": 1000, "output_tokens": 200, "outcome": "ok", "seconds": 2.0})


def no_keep(folder: Path) -> Night:
    night = Night(folder)
    night.propose(2.91, BASELINE_ARM)
    night.run()
    for i in range(3):
        night.propose(2.95, "random", matrix_lr=0.03 + 0.01 * i)
    night.run()
    return night


def rich(folder: Path) -> Night:
    """Two keeps in a chain, failures, rejections, placebos, promotion, spending, hostile text, a review."""
    night = Night(folder)
    night.propose(2.91, BASELINE_ARM)
    night.run()
    for i in range(6):
        night.propose(2.911 + 0.004 * i, "optuna", matrix_lr=0.011 + 0.001 * i)
    night.propose(0, PLACEBO_ARM)
    night.propose(2.9, "agent", HOSTILE, fails="diverged", router="norm")
    spend(night, "call-1", "reserved", 0.05)
    spend(night, "call-1", "settled", 0.0123)
    spend(night, "call-2", "reserved", 0.05)
    night.append({"event": "rejected", "arm": "agent", "kind": "malformed", "detail": HOSTILE})
    night.run()
    night.propose(2.885, "agent", HOSTILE, router="mlp")
    night.run()
    night.propose(2.906, "optuna", top_k=4, matrix_lr=0.05)
    night.propose(2.86, "optuna", top_k=3)
    night.run()
    night.propose(2.858, "random", top_k=1)
    night.run(promoting=True)
    first, last = night.view.incumbents[1:]
    night.append({"event": "reviewed", "candidate": last, "action": "accept", "why": "a | b", "by": "ada"})
    night.append({"event": "stopped", "reason": "budget-hours", "detail": "8 h"})
    return night
