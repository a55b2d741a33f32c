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
class Plan:
    name: str
    rungs: list[RungPlan]
    allowed_share: float  # of random candidates
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
            seconds = "–" if r.seconds_per_training is None else f"{r.seconds_per_training:.1f} s"
            lines.append(
                f"  rung {index}: depth {r.depth}, {r.tokens:,} tokens, {r.params_total:,} parameters "
                f"({r.params_active:,} active), {r.flops_per_training:.3g} FLOPs, about {seconds} a training; {runs}"
            )
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


def make_plan(space_file: Path) -> Plan:
    """Checks the question and prices it. Trains only a few steps of the baseline. Raises UserError."""
    space = load_space(space_file)
    corpus = ensure_corpus(space.metric.corpus)
    trainer = Path(space.trainer)
    if not trainer.exists():
        raise UserError(
            f"trainer = {space.trainer!r}: no such file in {Path.cwd()}; run where the trainer is"
        )
    describer = Describer(space, trainer.resolve())
    try:
        if problem := describer.check(describer.baseline):
            raise UserError(f"{space_file}: the baseline itself breaks its rules {problem}")
        allowed = allowed_share(space, describer)
    finally:
        describer.close()
    speed = None if space.rungs[0].gpus else _flops_per_second(space, trainer.resolve(), corpus, describer)
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
    return Plan(space.name, rungs, allowed, slots, space.budget, trainings, decisions)


def _rung_plan(rung: Rung, facts: dict[str, Any], speed: float | None) -> RungPlan:
    flops = float(facts["flops_per_token"] * rung.tokens)
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
    return describer.baseline[0]["flops_per_token"] * metrics["tokens"] / outcome["seconds"]
