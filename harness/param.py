"""One parameter of a search space: its kind, its range, and when it is in play."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

Setting = bool | int | float | str
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
