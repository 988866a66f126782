"""Loss scales, their conversion from and to other formats, and their configuration."""

from jmp_train.loss_scales.config import LossScaleConfig
from jmp_train.loss_scales.interchange import (
    loss_scale_from_dict,
    loss_scale_from_gradscaler,
    loss_scale_to_dict,
)
from jmp_train.loss_scales.states import DynamicLossScale, LossScale, NoOpLossScale, StaticLossScale

__all__ = [
    "DynamicLossScale",
    "LossScale",
    "LossScaleConfig",
    "NoOpLossScale",
    "StaticLossScale",
    "loss_scale_from_dict",
    "loss_scale_from_gradscaler",
    "loss_scale_to_dict",
]
