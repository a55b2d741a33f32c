"""From a proposal to a candidate: validated, counted, deduplicated and committed, or refused with a kind."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.propose import Proposal
from harness.records import BASELINE_ARM, SOURCE_ARM
from harness.space import RUN_FIELDS, Settings, Space, canonical, settings_diff
from harness.trial import Failure, TrialRunner
from harness.view import StudyView
from harness.worktree import Candidates

ID_CHARS = 12
TOTALS = ("params_total", "params_active", "params_unique_experts", "flops_per_token")
COUNTS = (*TOTALS, "tokens")
PLACEBO_BLOCK = 1000  # a placebo's seeds lie in a block of its own, so they pair with nobody's
PLACEBO_STRIDE = 50


class Refusal(Exception):
    """Why a proposal is not run: `kind` is out_of_range, config, constraint or duplicate."""

    def __init__(self, kind: str, detail: str):
        super().__init__(detail)
        self.kind = kind


class Describer:
    """Asks a trainer for its counts at every rung."""

    def __init__(self, space: Space, trainer: Path):
        self._space, self._trainer = space, trainer
        self._runner = TrialRunner()
        self._scratch = tempfile.TemporaryDirectory(prefix="moue-")
        self.trainer_sha256 = hashlib.sha256(trainer.read_bytes()).hexdigest()
        self.baseline = self.facts({})
        self.start: str | None = None  # of every training: the source's id, or a checkpoint's sha256
        if space.source.settings is not None:
            try:
                self.start = self.candidate_id(self.facts(space.source.settings))
            except UserError as error:
                raise UserError(f"[source]: {error}") from None
        elif space.source.checkpoint is not None:
            self.start = _checkpoint_sha256(Path(space.source.checkpoint))

    def facts(self, overrides: Settings) -> list[dict[str, Any]]:
        """One answer of `--describe` per rung, with the tokens that a training takes there.

        Raises UserError with the trainer's own words.
        """
        answers = []
        for rung in self._space.rungs:
            config = {**self._space.baseline, **overrides, "depth": rung.depth, "tokens": rung.tokens}
            try:
                answer = self._ask(config)
            except (Failure, RuntimeError) as failure:  # it refuses, or it cannot even be loaded
                raise UserError(f"{self._trainer.name} at depth {rung.depth}: {failure}") from None
            if missing := [key for key in (*TOTALS, "config") if key not in answer]:
                raise UserError(f"{self._trainer.name}: --describe leaves out {', '.join(missing)}; add them")
            horizon = answer["config"].get("horizon", 1.0)  # share of the rung's tokens that is trained on
            answers.append(answer | {"tokens": int(rung.tokens * horizon)})
        return answers

    def _ask(self, config: Settings) -> dict[str, Any]:
        try:
            return self._runner.describe(self._trainer, config, Path(self._scratch.name))
        except (RuntimeError, OSError):  # our fork server died: a new one
            self._runner.close()
            return self._runner.describe(self._trainer, config, Path(self._scratch.name))

    def check(self, facts: list[dict[str, Any]]) -> str | None:
        """The first constraint or matched budget that does not hold at some rung."""
        for answer, base in zip(facts, self.baseline, strict=True):
            problem = self._space.broken(answer["config"], answer, base)
            if problem:
                return f"at depth {answer['config']['depth']}: {problem}"
        return None

    def candidate_id(self, facts: list[dict[str, Any]], placebo: int | None = None) -> str:
        """Hash of the resolved settings at every rung, of the trainer and of what training goes on from.

        The seed is no part of it.
        """
        resolved = [
            {k: v for k, v in answer["config"].items() if k not in RUN_FIELDS - {"depth"}} for answer in facts
        ]
        content = {"settings": resolved, "trainer": self.trainer_sha256, "placebo": placebo}
        content |= {"start": self.start} if self.start else {}
        return hashlib.sha256(canonical(content).encode()).hexdigest()[:ID_CHARS]

    def close(self) -> None:
        self._runner.close()
        self._scratch.cleanup()


class Admission:
    """The door of one study."""

    def __init__(self, space: Space, describer: Describer, candidates: Candidates):
        self._space, self._describer, self._candidates = space, describer, candidates

    def baseline(self) -> dict:
        """Candidate zero as a `proposed` record."""
        facts = self._describer.baseline
        proposal = Proposal(BASELINE_ARM, {}, hypothesis="the baseline")
        record = self._record(proposal, self._describer.candidate_id(facts), self._space.complete({}), facts)
        return record | {"parent": None, "against": None, "changed": {}, "commit": self._candidates.base}

    def source(self) -> dict:
        """The run that all others go on from, as a `proposed` record."""
        settings = self._space.source.settings
        proposal = Proposal(SOURCE_ARM, settings, hypothesis="what the others go on from", name=SOURCE_ARM)
        settings = {**self._space.baseline, **settings}
        record = self._record(proposal, self._describer.start, settings, self._describer.facts(settings))
        record |= {"parent": None, "against": None}
        return self._committed(record, self._space.baseline, self._candidates.base)

    def candidate(self, view: StudyView, proposal: Proposal) -> dict:
        """The `proposed` record of a new candidate, whose commit is made. Raises Refusal."""
        settings, facts = self._resolve(proposal)
        number = view.asked[proposal.arm] if proposal.placebo else None
        candidate = self._describer.candidate_id(facts, number)
        if candidate in view.candidates:
            name = view.candidates[candidate].name or candidate
            raise Refusal("duplicate", f"same resolved settings as {name}")
        parent = proposal.parent if proposal.parent in view.candidates else view.baseline
        base = view.candidates[parent]
        record = self._record(proposal, candidate, settings, facts)
        record |= {"parent": parent, "against": view.incumbent}
        if number is not None:
            record["seed_block"] = PLACEBO_BLOCK + PLACEBO_STRIDE * number
        return self._committed(record, base.settings, base.proposed["commit"])

    def _committed(self, record: dict, base: Settings, base_commit: str) -> dict:
        """The record with what it changes, and with the commit that holds it."""
        changed = settings_diff(base, record["settings"])
        message = f"{record['arm']}: {record['hypothesis'] or record['family']}\n"
        message += "".join(f"\n{k}: {old} -> {new}" for k, (old, new) in changed.items())
        commit = self._candidates.commit(record["candidate"], base_commit, record["settings"], message)
        return record | {"changed": changed, "commit": commit}

    def _resolve(self, proposal: Proposal) -> tuple[Settings, list[dict]]:
        settings = {**self._space.baseline, **proposal.overrides}
        try:
            if not proposal.free:
                settings = self._space.complete(proposal.overrides)
        except UserError as error:
            raise Refusal("out_of_range", str(error)) from None
        try:
            facts = self._describer.facts(settings)
        except UserError as error:
            raise Refusal("config", str(error)) from None
        try:
            problem = self._describer.check(facts)
        except UserError as error:  # a rule that has no value at this point, as in 1 / 0
            problem = str(error)
        if problem:
            raise Refusal("constraint", problem)
        return settings, facts

    def _record(self, proposal: Proposal, candidate: str, settings: Settings, facts: list[dict]) -> dict:
        return {
            "event": "proposed",
            "candidate": candidate,
            "arm": proposal.arm,
            "name": proposal.name,
            "settings": settings,
            "hypothesis": proposal.hypothesis,
            "family": proposal.family,
            "expected_effect": proposal.expected_effect,
            "expected_slope": proposal.expected_slope,
            "trainer_sha256": self._describer.trainer_sha256,
            "placebo": proposal.placebo,
            "seed_block": 0,
            "call": proposal.call,
            **summary(facts),
        }


def summary(facts: list[dict[str, Any]]) -> dict[str, Any]:
    """The counts that the ledger keeps of a candidate: whole at the first rung, the totals above."""
    first = {key: facts[0].get(key) for key in (*COUNTS, "virtual_width")}
    return {"facts": first, "facts_by_rung": [{key: f.get(key) for key in COUNTS} for f in facts]}


def _checkpoint_sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(
            f"source.checkpoint = {str(path)!r}: {error.strerror}; name a checkpoint.pt"
        ) from None
