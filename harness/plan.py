"""What a night would do and cost, before anything is spent."""

from __future__ import annotations

import os
import random
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.admission import Describer
from harness.errors import UserError
from harness.space import Budget, Param, Rung, Setting, Settings, Space, load_space
from harness.study import ensure_corpus
from harness.trial import Failure, TrialRunner, TrialSpec, read_metrics

DRAWS = 64  # random candidates that tell how much of the space the constraints leave
CALIBRATION_TOKENS = 16_384
RUNS_PER_DECISION = 1.8  # simulated mean of the stream preset, controls and audits included


@dataclass(frozen=True)
class RungPlan:
    depth: int
    tokens: int
    seeds: int
    params_total: int
    params_active: int
    flops_per_training: float
    seconds_per_training: float | None
    gpus: float


@dataclass(frozen=True)
class DesignPlan:
    """One training of a listed design at the first rung, or of the source at any."""

    name: str
    params_total: int
    params_active: int
    tokens: int
    flops: float
    seconds: float | None

    def text(self) -> str:
        return (
            f"    {self.name}: {self.params_total:,} parameters ({self.params_active:,} active), {self.tokens:,} "
            f"tokens, {self.flops:.3g} FLOPs, about {_spell(self.seconds)} a training"
        )


@dataclass(frozen=True)
class Plan:
    name: str
    rungs: list[RungPlan]
    sources: list[DesignPlan]  # a training at each rung that all others there go on from
    designs: list[DesignPlan]  # those that the file lists
    refused: dict[str, str]  # listed as well -> why they would not run
    listed_trainings: int  # until every design had its last look: source, control and designs, audits apart
    listed_seconds: float | None  # of them all on all slots
    allowed_share: float | None  # of random candidates, where there are [params] to draw from
    slots: int
    budget: Budget
    trainings_in_time: int | None
    decisions_in_time: int | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"budget": self.budget.model_dump()}

    def text(self) -> str:
        lines = [f"{self.name}: {len(self.rungs)} rungs, {self.slots} slots on this machine"]
        for index, r in enumerate(self.rungs):
            runs = f"{r.seeds} control runs first" if index == 0 else f"{r.seeds} paired runs a candidate"
            seconds = _spell(r.seconds_per_training)
            lines.append(
                f"  rung {index}: depth {r.depth}, {r.tokens:,} tokens, {r.params_total:,} parameters "
                f"({r.params_active:,} active), {r.flops_per_training:.3g} FLOPs, about {seconds} a training; {runs}"
            )
        if self.sources:
            lines += ["  what all others go on from:", *(s.text() for s in self.sources)]
        if self.designs:
            lines.append(
                f"  listed designs: {len(self.designs)}, {self.listed_trainings:,} trainings until all had their last "
                f"look, about {_spell(self.listed_seconds)} on {self.slots} slots; audits of what passes it come on top"
            )
            lines += [d.text() for d in self.designs]
        lines += [f"    {name}: refused: {why}" for name, why in self.refused.items()]
        if self.allowed_share is not None:
            lines.append(f"  the constraints allow {self.allowed_share:.0%} of {DRAWS} random candidates")
        b = self.budget
        lines.append(
            f"  budget: {b.hours:g} h, {b.trials:,} trainings, {b.usd:g} USD for API calls"
            + (f", {b.gpu_hours:g} GPU-hours" if b.gpu_hours is not None else "")
        )
        if self.trainings_in_time is not None:
            gpu = sum(r.gpus for r in self.rungs[:1]) * self.budget.hours * self.slots
            lines.append(
                f"  in that time about {self.trainings_in_time:,} trainings, {self.decisions_in_time:,} decisions"
                + (f", {gpu:.1f} GPU-hours" if gpu else "")
            )
        return "\n".join(lines)


def _spell(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds:,.1f} s"


def make_plan(space_file: Path) -> Plan:
    """Checks the question and prices it. Trains only a few steps of the baseline. Raises UserError."""
    space = load_space(space_file)
    corpus = ensure_corpus(space.metric.corpus, space.metric.vocab_size)
    trainer = Path(space.trainer)
    if not trainer.exists():
        raise UserError(
            f"trainer = {space.trainer!r}: no such file in {Path.cwd()}; run where the trainer is"
        )
    describer = Describer(space, trainer.resolve())
    try:
        if problem := describer.check(describer.baseline):
            raise UserError(f"{space_file}: the baseline itself breaks its rules {problem}")
        allowed = allowed_share(space, describer) if space.params else None
        speed = (
            None if space.rungs[0].gpus else _flops_per_second(space, trainer.resolve(), corpus, describer)
        )
        sources, (designs, refused) = _sources(space, describer, speed), _designs(space, describer, speed)
    finally:
        describer.close()
    rungs = [
        _rung_plan(rung, facts, speed) for rung, facts in zip(space.rungs, describer.baseline, strict=True)
    ]
    slots = int((os.cpu_count() or 1) / space.rungs[0].cpus)
    trainings = None
    if rungs[0].seconds_per_training:
        trainings = min(
            int(space.budget.hours * 3600 * slots / rungs[0].seconds_per_training), space.budget.trials
        )
    decisions = None if trainings is None else int(max(0, trainings - rungs[0].seeds) / RUNS_PER_DECISION)
    if decisions is not None and not space.params:
        decisions = min(decisions, len(designs))
    num_listed = len(sources[:1]) + rungs[0].seeds + len(designs) * space.decision.looks[-1]
    seconds = None
    if speed:
        alone = sum(s.seconds for s in sources[:1])
        side_by_side = sum(d.seconds for d in designs) * space.decision.looks[-1]
        seconds = alone + (rungs[0].seconds_per_training * rungs[0].seeds + side_by_side) / slots
    return Plan(
        name=space.name,
        rungs=rungs,
        sources=sources,
        designs=designs,
        refused=refused,
        listed_trainings=num_listed,
        listed_seconds=seconds,
        allowed_share=allowed,
        slots=slots,
        budget=space.budget,
        trainings_in_time=trainings,
        decisions_in_time=decisions,
    )


def _sources(space: Space, describer: Describer, speed: float | None) -> list[DesignPlan]:
    if space.source.settings is None:
        return []
    facts = zip(space.rungs, describer.facts(space.source.settings), strict=True)
    return [_design_plan(f"at depth {rung.depth}", answer, speed) for rung, answer in facts]


def _designs(
    space: Space, describer: Describer, speed: float | None
) -> tuple[list[DesignPlan], dict[str, str]]:
    """The listed designs that would run, and what would be said to the others at the door."""
    known = {describer.candidate_id(describer.baseline): "the baseline"}
    designs, refused = [], {}
    for listed in space.candidates:
        try:
            facts = describer.facts(listed.settings)
            problem = describer.check(facts)
        except UserError as error:
            refused[listed.name] = str(error)
            continue
        twin = known.setdefault(describer.candidate_id(facts), listed.name)
        problem = f"same resolved settings as {twin}" if twin != listed.name else problem
        if problem:
            refused[listed.name] = problem
        else:
            designs.append(_design_plan(listed.name, facts[0], speed))
    return designs, refused


def _design_plan(name: str, facts: dict[str, Any], speed: float | None) -> DesignPlan:
    flops = float(facts["flops_per_token"] * facts["tokens"])
    return DesignPlan(
        name=name,
        params_total=facts["params_total"],
        params_active=facts["params_active"],
        tokens=facts["tokens"],
        flops=flops,
        seconds=flops / speed if speed else None,
    )


def _rung_plan(rung: Rung, facts: dict[str, Any], speed: float | None) -> RungPlan:
    flops = float(facts["flops_per_token"] * facts["tokens"])
    return RungPlan(
        depth=rung.depth,
        tokens=rung.tokens,
        seeds=rung.seeds,
        params_total=facts["params_total"],
        params_active=facts["params_active"],
        flops_per_training=flops,
        seconds_per_training=flops / speed if speed else None,
        gpus=rung.gpus,
    )


def allowed_share(space: Space, describer: Describer) -> float:
    """Share of random candidates that the constraints allow. Raises UserError when none is."""
    rng = random.Random(0)
    problems: list[str] = []
    for _ in range(DRAWS):
        try:
            problem = describer.check(describer.facts(random_settings(space, rng)))
        except UserError as error:
            problem = str(error)
        if problem:
            problems.append(problem)
    if len(problems) == DRAWS:
        raise UserError(f"the rules leave none of {DRAWS} random candidates, the last one {problems[-1]}")
    return 1 - len(problems) / DRAWS


def random_settings(space: Space, rng: random.Random) -> Settings:
    return space.complete({key: _draw(param, rng) for key, param in space.params.items()})


def _draw(param: Param, rng: random.Random) -> Setting:
    if param.kind == "categorical":
        return rng.choice(param.choices)
    if param.kind == "int":
        return int(param.low) + int(param.step or 1) * rng.randint(
            0, int((param.high - param.low) // (param.step or 1))
        )
    if param.step:
        index = rng.randint(0, int((param.high - param.low) / param.step + 1e-9))
        return min(param.high, param.low + param.step * index)
    if param.log:
        return param.low * (param.high / param.low) ** rng.random()
    return rng.uniform(param.low, param.high)


def _flops_per_second(space: Space, trainer: Path, corpus: Path, describer: Describer) -> float:
    """Measured on a few steps of the baseline at the first rung, on one slot of this machine."""
    rung = space.rungs[0]
    with tempfile.TemporaryDirectory(prefix="moue-plan-") as folder:
        config = {"seed": 0, "depth": rung.depth, "tokens": CALIBRATION_TOKENS, "device": "cpu"}
        spec = TrialSpec(
            trial="calibration",
            candidate="baseline",
            rung=0,
            purpose="control",
            config={**space.baseline, **config, "corpus": str(corpus.resolve())},
            trainer=str(trainer),
            patched=False,
            out=f"{folder}/out",
            source=None,
            train=True,
            splits=(),
            probes=False,
            corpus=str(corpus),
            context=space.metric.context,
            eval_bytes=space.metric.eval_bytes,
            timeout_seconds=rung.timeout_seconds,
            budget_seconds=rung.timeout_seconds,
            memory_mib=rung.memory_mib,
            cpus=rung.cpus,
            gpus=0,
        )
        runner = TrialRunner()
        try:
            outcome = runner.run(spec)["finished"]
            if outcome["failure"]:
                what = f"{outcome['failure']}: {outcome['detail']}"
                raise UserError(f"the baseline fails at depth {rung.depth}: {what}; mend [baseline]")
            metrics = read_metrics(Path(spec.out) / "metrics.jsonl")
        except Failure as failure:
            raise UserError(f"the baseline fails at depth {rung.depth}: {failure.detail}") from None
        finally:
            runner.close()
    if not metrics["tokens"]:
        raise UserError(f"{trainer.name}: metrics.jsonl has no `tokens`; write how many a run has seen")
    seconds = metrics["train_seconds"] or outcome["seconds"]  # the trainer's own clock leaves out its start
    return describer.baseline[0]["flops_per_token"] * metrics["tokens"] / seconds
