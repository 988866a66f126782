"""Configuration of the loss scale of an experiment."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jmp_train.fields import check_fields
from jmp_train.loss_scales.interchange import rename
from jmp_train.loss_scales.states import DynamicLossScale, LossScale, NoOpLossScale, StaticLossScale

#: Field of `LossScaleConfig` for each field of `DynamicLossScale`, which has jmp's names.
_FIELD_OF = {
    "period": "growth_interval",
    "factor": "growth_factor",
    "min_loss_scale": "minimum",
    "max_loss_scale": "maximum",
}


@dataclasses.dataclass(frozen=True)
class LossScaleConfig:
    """Loss scale, which float16 compute needs."""

    kind: Literal["auto", "none", "static", "dynamic"] = "auto"
    """Kind of loss scale; auto is dynamic where the policy uses float16, else none."""
    initial: float = 2.0**16
    """Initial scale (dynamic) or constant scale (static)."""
    growth_interval: int = 2000
    """Growth interval: consecutive finite steps after which the scale grows."""
    growth_factor: float = 2.0
    """Factor that multiplies the scale when it grows."""
    backoff_factor: float = 0.5
    """Factor that multiplies the scale after a non-finite step."""
    minimum: float = 1.0
    """Smallest scale after a backoff."""
    maximum: float | None = None
    """Largest scale after growth; None: the largest float32."""
    hysteresis: int = 1
    """Number of non-finite steps before the scale backs off; 1 backs off at the first."""
    consecutive_hysteresis: bool = False
    """Count only consecutive non-finite steps for hysteresis; False counts all until growth."""

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
          default: default loss scale of the precision. The kind `auto` is dynamic unless it is a
            `NoOpLossScale`.
        """
        if self.kind == "none":
            return NoOpLossScale()
        if self.kind == "static":
            return StaticLossScale(self.initial)
        needed = self.kind == "dynamic" or not isinstance(default, NoOpLossScale)
        return self._dynamic() if needed else NoOpLossScale()
