"""The night's driver: asks proposers, hands trials to a dispatcher, writes what happened, decides.

Everything it knows comes from the ledger; killing it at any point loses no finished trial.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from harness.admission import Admission
from harness.asking import Asking
from harness.dispatch import Finished
from harness.errors import ClusterLost, EndedEarly, UserError, WorkFailed
from harness.judge.corpus import corpus_folder
from harness.ledger import Ledger
from harness.promote import conclude, expected_runs
from harness.propose import Proposer
from harness.purse import Purse
from harness.records import Trial
from harness.schedule import Work, is_done_with, pending
from harness.space import Budget, Space
from harness.stats import decide
from harness.study import StudyPaths
from harness.trial import TrialSpec
from harness.view import StudyView, history, signed
from harness.worktree import Candidates

log = logging.getLogger("harness")

MAX_JUDGE_ATTEMPTS = 3
GRACE_SECONDS = 60.0  # a trial that outlasts the night's hours is ended, and repeated on --resume


class Search:
    """One session of a study. The dispatcher calls `next_task` and `on_result`, in one thread."""

    def __init__(
        self,
        paths: StudyPaths,
        space: Space,
        ledger: Ledger,
        view: StudyView,
        admission: Admission,
        candidates: Candidates,
        proposers: list[Proposer],
        shares: dict[str, float],
        budget: Budget,
    ):
        self.paths, self.space, self.ledger, self.view = paths, space, ledger, view
        self.candidates, self.purse = candidates, Purse(view, budget)
        self.asking = Asking(view, admission, proposers, shares)
        self.slots = [1] * len(space.rungs)
        self.on_progress: Callable[[], None] = lambda: None
        self._flying: dict[str, tuple[Work, TrialSpec, float]] = {}  # trial -> what, and since when
        self._judge_attempts: dict[str, int] = {}
        self._stop: tuple[str, str] | None = None
        self._corpus = corpus_folder(space.metric.corpus, space.metric.vocab_size).resolve()

    # ---- called by the dispatcher ----

    def next_task(self) -> TrialSpec | None:
        """The next trial to run, or None while there is nothing to start. Raises Finished at the end."""
        self._catch_up()
        self.on_progress()
        if self.purse.seconds_left() <= 0:
            self.stop("budget-hours", f"{self.purse.budget.hours:g} h are over")
        if self._stop is None and len(self._flying) < max(self.slots):
            work = next((w for w in self._pending() if w.trial not in self._flying), None)
            if work is None and self._may_explore():
                work = self._propose()
            if work is not None and len(self._flying) < self.slots[work.rung]:
                refusal = self.purse.refusal(work, (w for w, _, _ in self._flying.values()))
                if refusal is None:
                    return self._launch(work)
                self.stop(*refusal)
            idle = work is None and not self._flying
            if idle and (reason := self.asking.nothing_left()) and not self._pending():
                self.stop(*reason)  # and no promotion had waited for the last proposal
        if self._stop is not None and not self._flying:
            raise Finished
        return None

    def on_result(self, spec: TrialSpec, outcome: dict) -> None:
        """Records what a worker brought back, then draws every conclusion that follows."""
        self._flying.pop(spec.trial, None)
        for judged in outcome["judged"]:
            if judged["judge_id"] != self.view.opened["judge_id"]:
                raise RuntimeError(
                    f"{spec.trial} was scored by judge {judged['judge_id']}, the study has "
                    f"{self.view.opened['judge_id']}: the workers see another corpus or another harness"
                )
        events = [{"event": "judged", **j} for j in outcome["judged"]]
        if outcome["finished"]:
            events.append({"event": "finished", **outcome["finished"]})
        self._write(*events)
        self._log_result(spec, outcome)
        if not spec.train and outcome["failure"]:
            self._not_judged(spec, outcome)
        self._catch_up()
        self.sweep([spec.trial])

    def _not_judged(self, spec: TrialSpec, outcome: dict) -> None:
        """A finished trial could not be scored on a further split: train it anew, then call it failed."""
        self._drop_checkpoint(spec.trial)
        self._judge_attempts[spec.trial] = self._judge_attempts.get(spec.trial, 0) + 1
        if self._judge_attempts[spec.trial] >= MAX_JUDGE_ATTEMPTS:
            failed = {
                "event": "finished",
                "trial": spec.trial,
                "state": "FAIL",
                "failure": outcome["failure"],
            }
            detail = f"cannot be judged on {', '.join(spec.splits)}: {outcome['detail']}"
            self._write(failed | {"detail": detail, "seconds": None, "log": f"trials/{spec.trial}/judge.txt"})

    def lost(self, spec: TrialSpec, detail: str) -> None:
        """The worker died under the trial: a state, and another try."""
        seconds = time.monotonic() - self._flying[spec.trial][2]
        record = {"trial": spec.trial, "state": "FAIL", "failure": "lost", "detail": detail[:300]}
        record |= {"seconds": seconds, "gpus": spec.gpus, "log": f"trials/{spec.trial}/log.txt"}
        finished = record if spec.train else None
        self.on_result(spec, {"judged": [], "finished": finished, "failure": "lost", "detail": detail})

    def stop(self, reason: str, detail: str = "") -> None:
        """No new trials from now on."""
        if self._stop is None:
            self._stop = (reason, detail)

    def close(self, error: BaseException | None = None) -> str:
        """Writes why the session ended. Returns the reason."""
        for proposer in self.asking.proposers.values():
            proposer.close()
        reason, detail = self._stop or ("finished", "")
        if error is not None:
            lines = str(error).splitlines() or [type(error).__name__]
            reason, detail = _reason(error), lines[0]
        self._write({"event": "stopped", "reason": reason, "detail": detail})
        log.info("study %s stopped reason=%s %s", self.paths.name, reason, detail)
        return reason

    # ---- what is known ----

    def _write(self, *events: dict) -> None:
        if events:
            self.ledger.append(*events)
        self._read()

    def _read(self) -> None:
        """Folds new records in: our own and those that others wrote, a person's review for one."""
        for event in self.ledger.poll():
            self.view.apply(event)

    def _catch_up(self) -> None:
        """Writes the verdicts that are due, one by one: a keep changes what the next is measured against."""
        self._read()
        while event := self._conclusion():
            self._write(event)
            self._announce(event)

    def _conclusion(self) -> dict | None:
        failures = self.view.failures(self.view.baseline, 0)
        if len(failures) > max(1, len(self.view.scores(self.view.baseline, 0, "val"))):
            raise UserError(self._mishap(failures[0], "baseline"))
        for rung in range(len(self.slots) if self.view.source else 0):
            if failures := self.view.failures(self.view.source, rung):
                raise WorkFailed(self._mishap(failures[0], "source"))
        for candidate in sorted(self.view.open.values(), key=lambda c: c.order):
            if verdict := decide(self.view, candidate):
                return verdict
        return next(iter(conclude(self.view)), None)

    def _mishap(self, trial: Trial, what: str) -> str:
        """Why there is nothing to go on from, in one line."""
        return (
            f"the {what} fails at depth {self.space.rungs[trial.rung].depth}: {trial.failure}: {trial.detail} "
            f"(log: {self.paths.trial(trial.id) / 'log.txt'}); mend [{what}] and search with --study NEW"
        )

    def _announce(self, event: dict) -> None:
        """Log line, git note, and word to the proposers once a candidate is decided."""
        candidate = self.view.candidates[event["candidate"]]
        what = event.get("verdict", "promoted")
        log.info(
            "candidate %s %s %s n=%d delta=%s z=%s arm=%s %s",
            candidate.id, what, event.get("stage", f"depth={event.get('depth')}"), event["n"],
            signed(event.get("delta")), signed(event.get("z"), 2), candidate.arm, event["reason"],
        )  # fmt: skip
        if candidate.id in self.view.open:
            return
        self.candidates.note(candidate.proposed["commit"], history(self.view, candidate.id))
        if what == "promoted":
            return
        for proposer in self.asking.proposers.values():
            proposer.tell(self.view, candidate)
        self.sweep([t for c in (candidate.id, event["against"]) for t in self.view.trials_at[c, 0]])

    def _drop_checkpoint(self, trial: str) -> None:
        (self.paths.trial(trial) / "checkpoint.pt").unlink(missing_ok=True)

    def sweep(self, trials: Iterable[str]) -> None:
        """Drops the weights that nothing will be judged from again."""
        for trial in trials:
            if trial not in self._flying and is_done_with(self.view, trial):
                self._drop_checkpoint(trial)

    # ---- what to run ----

    def _pending(self) -> list[Work]:
        work = list(pending(self.view, self._promoting()))
        if self.purse.must_promote(self.slots):  # what is left of the night is promotion's
            work.sort(key=lambda w: w.rung == 0)  # undecided candidates stay undecided
        return work

    def _promoting(self) -> bool:
        if self.asking.nothing_left():
            return bool(expected_runs(self.view))
        return self.purse.must_promote(self.slots)

    def _may_explore(self) -> bool:
        """Control first; and what promotion needs of the night is not spent on new candidates."""
        control = len(self.view.scores(self.view.baseline, 0, "val"))
        return control >= self.space.rungs[0].seeds and not self._promoting()

    def _propose(self) -> Work | None:
        """The first trial of a new candidate, if an arm has one."""
        if self.asking.new_candidate(self._write) is None:
            return None
        return next((w for w in self._pending() if w.trial not in self._flying), None)

    def _launch(self, work: Work) -> TrialSpec:
        rung, candidate = self.space.rungs[work.rung], self.view.candidates[work.candidate]
        checkout = self.candidates.checkout(self.view.opened["base_commit"])
        run = {"seed": work.seed, "depth": rung.depth, "tokens": rung.tokens, "corpus": str(self._corpus)}
        run["device"] = "cuda" if rung.gpus else "cpu"
        metric = self.space.metric
        spec = TrialSpec(
            trial=work.trial,
            candidate=work.candidate,
            rung=work.rung,
            purpose=work.purpose,
            config={**candidate.settings, **run},
            trainer=str(checkout / self.candidates.trainer),
            patched=False,
            out=str(self.paths.trial(work.trial).resolve()),
            source=self._source(work),
            train=work.train,
            splits=work.splits,
            probes=work.purpose == "audit",
            corpus=str(self._corpus),
            context=metric.context,
            eval_bytes=metric.eval_bytes,
            timeout_seconds=rung.timeout_seconds,
            budget_seconds=self.purse.seconds_left() + GRACE_SECONDS,
            memory_mib=rung.memory_mib,
            cpus=rung.cpus,
            gpus=rung.gpus,
        )
        if work.train:
            started = {"event": "started", "trial": work.trial, "candidate": work.candidate}
            started |= {"rung": work.rung, "seed": work.seed, "depth": rung.depth, "tokens": rung.tokens}
            started |= {"purpose": work.purpose}
            self._write(started)
        self._flying[work.trial] = (work, spec, time.monotonic())
        return spec

    def _source(self, work: Work) -> str | None:
        """The checkpoint that the trial goes on from. Raises UserError where it is gone."""
        path, trial = self.space.source.checkpoint, self.view.source_trial(work.rung)
        if trial == work.trial or not (path or trial):
            return None
        checkpoint = Path(path) if path else self.paths.trial(trial) / "checkpoint.pt"
        if not checkpoint.exists():
            raise UserError(f"{checkpoint}: what every run goes on from is gone; put it back, then --resume")
        return str(checkpoint.resolve())

    def _log_result(self, spec: TrialSpec, outcome: dict) -> None:
        trial = self.view.trials[spec.trial]
        scores = " ".join(f"{j['split']}_bpb={j['bpb']:.4f}" for j in outcome["judged"])
        if outcome["failure"]:
            log.warning("trial %s FAIL kind=%s %s", spec.trial, outcome["failure"], trial.detail)
        else:
            log.info("trial %s complete %s purpose=%s", spec.trial, scores, spec.purpose)


def _reason(error: BaseException) -> str:
    if isinstance(error, (EndedEarly, KeyboardInterrupt)):
        return "signal"
    return "ray-lost" if isinstance(error, ClusterLost) else "error"
