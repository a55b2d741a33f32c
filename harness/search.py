"""The night's driver: asks proposers, hands trials to a dispatcher, writes what happened, decides.

Everything it knows comes from the ledger; killing it at any point loses no finished trial.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from harness.admission import Admission, Refusal
from harness.dispatch import Finished
from harness.errors import ClusterLost, EndedEarly, UserError
from harness.judge.corpus import corpus_folder
from harness.ledger import Ledger
from harness.promote import conclude
from harness.propose import Proposal, Proposer, arms_by_need
from harness.purse import Purse, promotions_due
from harness.schedule import Work, pending
from harness.space import Budget, Space
from harness.stats import decide
from harness.study import StudyPaths
from harness.trial import TrialSpec
from harness.view import StudyView
from harness.worktree import Candidates

log = logging.getLogger("harness")

MAX_REFUSALS_IN_A_ROW = 60  # no proposer finds anything new: the space is exhausted
MAX_JUDGE_ATTEMPTS = 3


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
        self.admission, self.candidates = admission, candidates
        self.proposers = {p.arm: p for p in proposers}
        self.shares, self.purse = shares, Purse(view, budget)
        self.slots = 1
        self.on_progress: Callable[[], None] = lambda: None
        self._flying: dict[str, tuple[Work, TrialSpec, float]] = {}  # trial -> what, and since when
        self._judge_attempts: dict[str, int] = {}
        self._refusals = 0
        self._stop: tuple[str, str] | None = None
        self._corpus = corpus_folder(space.metric.corpus).resolve()

    # ---- called by the dispatcher ----

    def next_task(self) -> TrialSpec | None:
        """The next trial to run, or None while there is nothing to start. Raises Finished at the end."""
        self._catch_up()
        self.on_progress()
        if self._stop is None and len(self._flying) < self.slots:
            work = next((w for w in self._pending() if w.trial not in self._flying), None)
            if work is None and not self._promoting():
                work = self._propose()
            if work is not None:
                refusal = self.purse.refusal(work, (w for w, _, _ in self._flying.values()))
                if refusal is None:
                    return self._launch(work)
                self.stop(*refusal)
            if work is None and not self._flying and self._refusals >= MAX_REFUSALS_IN_A_ROW:
                self.stop("space-exhausted", "no proposer had anything new")
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
            self._judge_attempts[spec.trial] = self._judge_attempts.get(spec.trial, 0) + 1
            if self._judge_attempts[spec.trial] >= MAX_JUDGE_ATTEMPTS:
                raise RuntimeError(f"{spec.trial} cannot be judged on {', '.join(spec.splits)}")
        self._catch_up()

    def lost(self, spec: TrialSpec, detail: str) -> None:
        """The worker died under the trial: a state, and another try."""
        seconds = time.monotonic() - self._flying[spec.trial][2]
        record = {"trial": spec.trial, "state": "FAIL", "failure": "lost", "detail": detail[:300]}
        record |= {"seconds": seconds, "gpus": spec.gpus, "log": f"trials/{spec.trial}/log.txt"}
        self.on_result(spec, {"judged": [], "finished": record if spec.train else None, "failure": "lost"})

    def stop(self, reason: str, detail: str = "") -> None:
        """No new trials from now on."""
        if self._stop is None:
            self._stop = (reason, detail)

    def close(self, error: BaseException | None = None) -> str:
        """Writes why the session ended. Returns the reason."""
        for proposer in self.proposers.values():
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
        failure = self.view.failed(self.view.baseline, 0)
        if failure and self.view.incumbent == self.view.baseline:
            raise UserError(
                f"the baseline fails at depth {self.space.rungs[0].depth}: {failure.failure}: {failure.detail} "
                f"(log: {self.paths.trial(failure.id) / 'log.txt'}); mend [baseline] and search with --study NEW"
            )
        for candidate in sorted(self.view.open.values(), key=lambda c: c.order):
            if verdict := decide(self.view, candidate):
                return verdict
        return next(iter(conclude(self.view)), None)

    def _announce(self, event: dict) -> None:
        """Log line, git note, and word to the proposers once a candidate is decided."""
        candidate = self.view.candidates[event["candidate"]]
        what = event.get("verdict", "promoted")
        log.info(
            "candidate %s %s %s n=%d delta=%s z=%s arm=%s %s",
            candidate.id, what, event.get("stage", f"depth={event.get('depth')}"), event["n"],
            _signed(event.get("delta")), _signed(event.get("z"), 2), candidate.arm, event["reason"],
        )  # fmt: skip
        if candidate.id in self.view.open:
            return
        self.candidates.note(candidate.proposed["commit"], self._note(candidate.id))
        if what == "promoted":
            return
        for proposer in self.proposers.values():
            proposer.tell(self.view, candidate)
        # Decided: nothing will be judged again from these weights.
        self._drop_checkpoints(event["against"] if what == "keep" and not candidate.placebo else candidate.id)

    def _note(self, candidate: str) -> str:
        record = self.view.candidates[candidate]
        lines = [
            f"{v['verdict']} stage={v['stage']} n={v['n']} delta={_signed(v.get('delta'))} "
            f"se={_signed(v.get('se'))} {v['reason']}"
            for v in record.verdicts
        ]
        lines += [
            f"promoted depth={e['depth']} n={e['n']} delta={_signed(e['delta'])} {e['reason']}"
            for e in self.view.promoted
            if e["candidate"] == candidate
        ]
        return "\n".join(lines)

    def _drop_checkpoints(self, candidate: str) -> None:
        for trial in self.view.trials_at[candidate, 0]:
            (self.paths.trial(trial) / "checkpoint.pt").unlink(missing_ok=True)

    # ---- what to run ----

    def _pending(self) -> list[Work]:
        promoting = self._promoting()
        work = list(pending(self.view, promoting))
        if promoting:  # what is left of the night belongs to promotion; undecided candidates stay undecided
            work.sort(key=lambda w: w.purpose != "promotion")
        return work

    def _promoting(self) -> bool:
        exhausted = self._refusals >= MAX_REFUSALS_IN_A_ROW
        return (exhausted and bool(promotions_due(self.view))) or self.purse.must_promote(self.slots)

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
            train=work.train,
            splits=work.splits,
            probes=work.purpose == "audit",
            corpus=str(self._corpus),
            context=metric.context,
            eval_bytes=metric.eval_bytes,
            timeout_seconds=rung.timeout_seconds,
            memory_mib=rung.memory_mib,
            cpus=rung.cpus,
            gpus=rung.gpus,
        )
        if work.train:
            started = {
                "event": "started",
                "trial": work.trial,
                "candidate": work.candidate,
                "rung": work.rung,
            }
            started |= {
                "seed": work.seed,
                "depth": rung.depth,
                "tokens": rung.tokens,
                "purpose": work.purpose,
            }
            self._write(started)
        self._flying[work.trial] = (work, spec, time.monotonic())
        return spec

    # ---- proposals ----

    def _propose(self) -> Work | None:
        """Asks the arms in turn until one has something new; its first trial, or None."""
        while self._refusals < MAX_REFUSALS_IN_A_ROW and self._stop is None:
            for arm in arms_by_need(self.view, self.shares):
                proposal = self.proposers[arm].ask(self.view, self.view.asked[arm])
                if proposal is not None:
                    break
            else:
                return None
            if self._admit(proposal):
                self._refusals = self._refusals if proposal.placebo else 0
                return next((w for w in self._pending() if w.trial not in self._flying), None)
            self._refusals += 1
        return None

    def _admit(self, proposal: Proposal) -> bool:
        """Makes a candidate of the proposal, or records with its kind why not."""
        try:
            event = self.admission.candidate(self.view, proposal)
        except Refusal as refusal:
            rejected = {"event": "rejected", "arm": proposal.arm, "kind": refusal.kind}
            rejected |= {"detail": str(refusal), "overrides": proposal.overrides, "call": proposal.call}
            self._write(rejected)
            self.proposers[proposal.arm].refuse(rejected)
            log.info("proposal refused arm=%s kind=%s %s", proposal.arm, refusal.kind, refusal)
            return False
        self._write(event)
        return True

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


def _signed(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:+.{digits}f}"
