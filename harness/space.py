"""The question: a search-space file in TOML, validated, hashed and frozen.

harness plan search_spaces/smoke.toml
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from harness.errors import UserError
from harness.expression import evaluate
from harness.param import NAME, STRICT, Listed, Param, Setting, Source, Value, check_listed, check_params

Settings = dict[str, Setting]

# Facts of one training run, owned by the rung and the machine: never a question of the search.
RUN_FIELDS = frozenset(
    {"seed", "depth", "tokens", "device", "corpus", "log_every", "micro_tokens", "save_every", "compile"}
)


class Strict(BaseModel):
    model_config = STRICT


class Metric(Strict):
    """What is measured: bits per byte on held-out documents of one corpus."""

    name: Literal["val_bpb"] = "val_bpb"
    corpus: str = "embedded"  # name of a prepared corpus
    vocab_size: int = Field(256, ge=256, le=65_535)  # 256: bytes; above: the BPE of `harness prepare --vocab`
    context: int = Field(256, ge=16)  # tokens a row of the judge shows the model
    eval_bytes: int = Field(131_072, ge=4096)  # bytes of text scored per split


class Constraint(Strict):
    expr: str  # over the resolved settings and the trainer's counts; true means allowed
    why: str = ""


class Match(Strict):
    """What stays equal to the baseline, within a relative tolerance."""

    hold: list[
        Literal["params_total", "params_active", "params_unique_experts", "flops_per_token", "tokens"]
    ] = []
    tolerance: float = Field(0.02, ge=0, lt=1)


class Rung(Strict):
    """One depth with its budget: a complete short run, never a cut long one."""

    depth: int = Field(ge=1)
    tokens: int = Field(gt=0)
    seeds: int = Field(8, ge=2)  # first rung: the control's first runs; above: paired runs per candidate
    promote: int = Field(1, ge=0)  # so many of the latest keeps climb to the next rung
    review: bool = False  # a person accepts a candidate before it enters this rung
    timeout_seconds: float = Field(3600, gt=0)
    memory_mib: int = Field(4096, ge=256)
    cpus: float = Field(1, gt=0)
    gpus: float = Field(0, ge=0)


class Decision(Strict):
    """Error rates of the keep rule (the `stream` preset: bounds from a Bayes-optimal stopping rule)."""

    against: Literal["incumbent", "baseline"] = "incumbent"  # what every candidate is measured against
    looks: list[int] = [1, 2, 4, 8]
    drop: list[float] = [0.3, 0.8, 1.3, 1.7]
    keep: list[float] = [2.6, 2.2, 1.9, 1.7]
    audit_seeds: int = Field(6, ge=2)
    audit_z: float = 1.28
    refresh: int = Field(8, ge=1)  # one more control run per so many decisions
    placebo_share: float = Field(0.05, ge=0, lt=1)

    @model_validator(mode="after")
    def _aligned(self) -> Decision:
        if not len(self.looks) == len(self.drop) == len(self.keep) or not self.looks:
            raise ValueError("`looks`, `drop` and `keep` need one value per look")
        if self.looks != sorted(set(self.looks)) or self.looks[0] < 1:
            raise ValueError(f"`looks` must rise from 1 or more, not {self.looks}")
        if any(low > high for low, high in zip(self.drop, self.keep, strict=True)):
            raise ValueError("each `drop` bound must lie at or below its `keep` bound")
        if self.drop[-1] != self.keep[-1]:
            raise ValueError(
                "the last look must decide: its drop bound "
                f"({self.drop[-1]}) must equal its keep bound ({self.keep[-1]})"
            )
        return self


class Budget(Strict):
    """Ceilings; whichever is met first ends the night."""

    hours: float = Field(8.0, gt=0)
    trials: int = Field(100_000, gt=0)
    usd: float = Field(0.0, ge=0)
    gpu_hours: float | None = Field(None, gt=0)


class Price(Strict):
    """US dollars per million tokens."""

    input: float = Field(ge=0)
    output: float = Field(ge=0)
    cache_write: float = Field(ge=0)
    cache_read: float = Field(ge=0)


class AgentSettings(Strict):
    model: str = "claude-sonnet-5-5"
    max_output_tokens: int = Field(4096, ge=256)
    timeout_seconds: float = Field(120.0, gt=0)
    attempts: int = Field(4, ge=1)
    price: Price = Price(input=3.0, output=15.0, cache_write=3.75, cache_read=0.3)


class Space(Strict):
    """One question with its baseline, ladder, error rates and budget."""

    name: str = Field(pattern=f"^{NAME}$")
    question: str = ""
    trainer: str = "train_small.py"
    metric: Metric = Metric()
    baseline: dict[str, Value]
    params: dict[str, Param] = {}
    candidates: list[Listed] = []
    source: Source = Source()
    constraints: list[Constraint] = []
    match: Match = Match()
    rungs: list[Rung] = Field(min_length=1)
    decision: Decision = Decision()
    budget: Budget = Budget()
    proposers: dict[str, float] = {"optuna": 0.7, "random": 0.3}
    agent: AgentSettings = AgentSettings()

    @field_validator("rungs")
    @classmethod
    def _rising(cls, rungs: list[Rung]) -> list[Rung]:
        depths = [r.depth for r in rungs]
        if depths != sorted(set(depths)):
            raise ValueError(f"depths must rise from rung to rung, not {depths}")
        return rungs

    @model_validator(mode="after")
    def _consistent(self) -> Space:
        settings = [
            self.baseline,
            self.params,
            self.source.settings or {},
            *(c.settings for c in self.candidates),
        ]
        for key in RUN_FIELDS & set().union(*settings):
            raise ValueError(f"{key!r} belongs to the rung or the machine and cannot be searched: remove it")
        if not self.params and not self.candidates:
            raise ValueError("params: missing; add it, or [[candidates]]")
        check_params(self.params, self.baseline)
        check_listed(self.candidates, self.params)
        return self

    def active(self, key: str, settings: Settings) -> bool:
        """Whether the parameter is in play under its `when`."""
        for other, wanted in self.params[key].when.items():
            if settings[other] not in wanted or not self.active(other, settings):
                return False
        return True

    def complete(self, overrides: Settings) -> Settings:
        """The baseline with the overrides laid over it; a parameter out of play keeps its baseline value.

        Raises UserError for an unknown key, a run field or a value out of range.
        """
        for key, value in overrides.items():
            if key not in self.params:
                known = ", ".join(sorted(self.params))
                raise UserError(f"{key} = {value!r}: not a parameter of this space; it has {known}")
            if not self.params[key].holds(value):
                raise UserError(f"{key} = {value!r}: must be {self.params[key].describe()}")
        settings = {**self.baseline, **overrides}
        for key in self.params:
            if not self.active(key, settings):
                settings[key] = self.baseline[key]
            elif self.params[key].kind == "float":
                settings[key] = float(settings[key])
            elif self.params[key].kind == "int":
                settings[key] = int(settings[key])
        return settings

    def holds(self, settings: Settings) -> bool:
        """Whether the settings are a point of [params], and not a design that lies beside it."""
        return settings == self.complete({key: settings[key] for key in self.params})

    def broken(self, resolved: dict[str, Any], facts: dict[str, Any], base: dict[str, Any]) -> str | None:
        """The first constraint or matched budget that a resolved configuration breaks, in words."""
        if (size := resolved.get("vocab_size", self.metric.vocab_size)) != self.metric.vocab_size:
            return (
                f"vocab_size = {size} is not the corpus's {self.metric.vocab_size}: set vocab and vocab_size "
                "under [baseline] to fit vocab_size under [metric]"
            )
        for c in self.constraints:
            if not evaluate(c.expr, {**resolved, **facts, "n_layer": resolved["depth"]}):
                return f"constraint `{c.expr}` does not hold" + (f" ({c.why})" if c.why else "")
        for key in self.match.hold:
            gap = facts[key] - base[key]
            if abs(gap) > self.match.tolerance * base[key]:
                return (
                    f"{key} = {facts[key]:,} is {gap:+,} off the baseline's {base[key]:,} "
                    f"(tolerance {self.match.tolerance:.1%})"
                )
        return None

    def sha256(self) -> str:
        return hashlib.sha256(canonical(self.model_dump(mode="json")).encode()).hexdigest()


def settings_diff(old: Settings, new: Settings) -> dict[str, list[Setting | None]]:
    """key -> [old, new] wherever two settings differ; None where one leaves a key to the trainer."""
    keys = dict.fromkeys([*new, *old])
    return {k: [old.get(k), new.get(k)] for k in keys if old.get(k) != new.get(k)}


def canonical(value: Any) -> str:
    """One spelling per value: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def load_space(path: str | Path) -> Space:
    """Reads and validates a search-space file. Raises UserError naming file, key, value and remedy."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = tomllib.load(file)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the path of a search-space file") from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # also a number of thousands of digits, thousands of brackets
        raise UserError(f"{path}: not TOML: {error}") from None
    return parse_space(raw, str(path))


def parse_space(raw: dict[str, Any], place: str) -> Space:
    try:
        return Space.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{place}: {' '.join(_first_problem(error).split())}") from None


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{where} = {first['input']!r}: unknown key; remove it or correct its spelling"
    if first["type"] == "missing":
        return f"{where}: missing; add it"
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:] if message.startswith("Input") else message
    value = f" = {first['input']!r}" if isinstance(first["input"], (str, int, float, bool)) else ""
    return f"{where}{value}: {message}".lstrip(": ")
