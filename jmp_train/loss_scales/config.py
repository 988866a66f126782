"""The loss scale as fields of an experiment."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jmp_train.fields import check_fields
from jmp_train.loss_scales.interchange import rename
from jmp_train.loss_scales.states import DynamicLossScale, LossScale, NoOpLossScale, StaticLossScale

#: The fields of `LossScaleConfig` that `DynamicLossScale` knows by jmp's names.
_FIELD_OF = {
    "period": "growth_interval",
    "factor": "growth_factor",
    "min_loss_scale": "minimum",
    "max_loss_scale": "maximum",
}


@dataclasses.dataclass(frozen=True)
class LossScaleConfig:
    """Loss scale; float16 compute needs one."""

    kind: Literal["auto", "none", "static", "dynamic"] = "auto"
    """auto: dynamic where the policy computes in float16, else none."""
    initial: float = 2.0**16
    """First scale (dynamic), or the scale (static)."""
    growth_interval: int = 2000
    """Finite steps in a row before the scale grows."""
    growth_factor: float = 2.0
    """What it is multiplied by then."""
    backoff_factor: float = 0.5
    """What it is multiplied by on a non-finite step."""
    minimum: float = 1.0
    """It never backs off below this."""
    maximum: float | None = None
    """It never grows above this; None: float32 is the limit."""
    hysteresis: int = 1
    """The number of non-finite steps on which it first backs off; 1 backs off at once."""
    consecutive_hysteresis: bool = False
    """Whether only non-finite steps in a row count for that; else they count until it grows."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.initial < float("inf"):
            raise ValueError(f"initial is {self.initial}; expected a finite number above 0")
        try:
            self._dynamic()
        except ValueError as error:
            raise ValueError(rename(str(error), _FIELD_OF)) from None

    def _dynamic(self) -> DynamicLossScale:
        return DynamicLossScale(
            self.initial,
            period=self.growth_interval,
            factor=self.growth_factor,
            min_loss_scale=self.minimum,
            backoff_factor=self.backoff_factor,
            max_loss_scale=self.maximum,
            hysteresis=self.hysteresis,
            consecutive_hysteresis=self.consecutive_hysteresis,
        )

    def make(self, default: LossScale) -> LossScale:
        """Return the first state of the loss scale.

        Args:
          default: what the precision needs by itself; `auto` is dynamic where that is not none.
        """
        if self.kind == "none":
            return NoOpLossScale()
        if self.kind == "static":
            return StaticLossScale(self.initial)
        needed = self.kind == "dynamic" or not isinstance(default, NoOpLossScale)
        return self._dynamic() if needed else NoOpLossScale()
