"""jmp_train: mixed-precision training for JAX and Flax, in pure functions."""

from jmp_train.precision.dtypes import dtype_to_names, fastest_dtype, half_dtype
from jmp_train.precision.gradients import GradResult, value_and_grad
from jmp_train.precision.loss_scale import (
    DynamicLossScale,
    LossScale,
    NoOpLossScale,
    StaticLossScale,
    all_finite,
    default_loss_scale,
    select_tree,
)
from jmp_train.precision.policy import Policy, cast_to_full, cast_to_half, get_policy

__all__ = [
    "DynamicLossScale",
    "GradResult",
    "LossScale",
    "NoOpLossScale",
    "Policy",
    "StaticLossScale",
    "all_finite",
    "cast_to_full",
    "cast_to_half",
    "default_loss_scale",
    "dtype_to_names",
    "fastest_dtype",
    "get_policy",
    "half_dtype",
    "select_tree",
    "value_and_grad",
]
