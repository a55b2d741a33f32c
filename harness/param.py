"""What a search space is made of: parameters with their ranges, designs listed by name, what training starts from."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Setting = bool | int | float | str
NAME = r"[a-z0-9][a-z0-9_-]{0,63}"  # of spaces, studies and designs: a folder's name as well

STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _plain(value: Any) -> Any:
    if not isinstance(value, (bool, int, float, str)) or (
        isinstance(value, float) and not math.isfinite(value)
    ):
        raise ValueError("must be true, false, a finite number or a text")
    return value


Value = Annotated[Setting, BeforeValidator(_plain)]
Values = Annotated[list[Value], BeforeValidator(lambda v: v if isinstance(v, list) else [v])]


class Param(BaseModel):
    """One parameter: its kind, its range, and when it is in play."""

    model_config = STRICT

    kind: Literal["float", "int", "categorical"]
    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = None
    choices: list[Value] | None = None
    when: dict[str, Values] = {}  # in play only while each of these parameters has one of these values

    @model_validator(mode="after")
    def _complete(self) -> Param:
        if self.kind == "categorical":
            if not self.choices:
                raise ValueError("a categorical needs `choices = [...]`")
            if self.low is not None or self.high is not None or self.log or self.step is not None:
                raise ValueError("a categorical takes only `choices`, not low, high, log or step")
            if len(set(self.choices)) < len(self.choices):
                raise ValueError(f"a value stands twice in `choices` = {self.choices}: remove one")
            return self
        if self.choices is not None:
            raise ValueError(f"`choices` belongs to kind = 'categorical', not to {self.kind!r}")
        if self.low is None or self.high is None:
            raise ValueError(f"kind = {self.kind!r} needs `low` and `high`")
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) is above high ({self.high}): swap them")
        if self.log and self.low <= 0:
            raise ValueError(f"a log range needs low > 0, not {self.low}")
        if self.kind == "int" and (self.low % 1 or self.high % 1 or (self.step or 1) % 1):
            raise ValueError(f"an int takes whole numbers, not {self.low}..{self.high} step {self.step}")
        if self.step is not None and (self.step <= 0 or self.log):
            raise ValueError("`step` must be above 0 and does not go with `log`")
        return self

    def holds(self, value: Setting) -> bool:
        """Whether `value` lies in this range and has its kind."""
        if self.kind == "categorical":
            return any(type(value) is type(c) and value == c for c in self.choices or [])
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not self.low <= value <= self.high
        ):
            return False
        if self.kind == "int" and value != int(value):
            return False
        return self.step is None or abs((value - self.low) / self.step % 1 - 0.5) >= 0.5 - 1e-9

    def describe(self) -> str:
        if self.kind == "categorical":
            return "one of " + ", ".join(map(str, self.choices or []))
        return f"{self.kind} in [{self.low:g}, {self.high:g}]" + (f" step {self.step:g}" if self.step else "")


class Listed(BaseModel):
    """A design of the user's own: any settings of the trainer, laid over the baseline."""

    model_config = STRICT

    name: str = Field(pattern=f"^{NAME}$")
    settings: dict[str, Value] = Field(min_length=1)
    why: str = ""


class Source(BaseModel):
    """What every training goes on from: a run of the study's own, one a rung, or a checkpoint that is there."""

    model_config = STRICT

    settings: dict[str, Value] | None = None  # laid over the baseline
    checkpoint: str | None = None

    @model_validator(mode="after")
    def _one(self) -> Source:
        if self.settings is not None and self.checkpoint is not None:
            raise ValueError("takes `settings` or `checkpoint`, not both: remove one")
        return self


def check_params(params: dict[str, Param], baseline: dict[str, Setting]) -> None:
    """Raises ValueError where a parameter, its baseline value and its `when` do not fit together."""
    for key, param in params.items():
        if key not in baseline:
            raise ValueError(f"params.{key} has no baseline value: add `{key} = ...` under [baseline]")
        if not param.holds(baseline[key]):
            raise ValueError(
                f"baseline.{key} = {baseline[key]!r} lies outside params.{key} ({param.describe()})"
            )
        for other, wanted in param.when.items():
            if other not in baseline:
                raise ValueError(f"params.{key}.when names {other!r}, which has no baseline value")
            if other not in params:
                raise ValueError(f"params.{key}.when names {other!r}, which is not under [params]")
            if list(params).index(other) >= list(params).index(key):
                raise ValueError(f"params.{key}.when needs params.{other} above it: move it up")
            for value in wanted:
                if not params[other].holds(value):
                    raise ValueError(
                        f"params.{key}.when.{other} = {value!r}: params.{other} is {params[other].describe()}"
                    )


def check_listed(listed: list[Listed], params: dict[str, Param]) -> None:
    """Raises ValueError for a name that is taken, or a value outside the range of a parameter."""
    taken = {"baseline", "source"}  # rows of the same tables
    for design in listed:
        if design.name in taken:
            raise ValueError(f"candidates: the name {design.name!r} is taken: choose another")
        taken.add(design.name)
        for key in design.settings.keys() & params.keys():
            if not params[key].holds(design.settings[key]):
                raise ValueError(
                    f"candidates: {design.name}: {key} = {design.settings[key]!r} lies outside params.{key} "
                    f"({params[key].describe()}): widen the range"
                )
