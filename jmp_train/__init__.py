"""jmp_train: mixed-precision training for JAX and Flax, in pure functions."""

from jmp_train.optim.fp32_state import fp32_state
from jmp_train.precision.autocast import (
    AutocastReport,
    OpRow,
    autocast,
    explain_autocast,
    with_precision,
)
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
from jmp_train.precision.op_rules import OpRules, default_op_rules
from jmp_train.precision.policy import Policy, cast_to_full, cast_to_half, get_policy
from jmp_train.training.evaluation import make_evaluate
from jmp_train.training.state import StepInfo, TrainState
from jmp_train.training.step import Stepper, make_step

__all__ = [
    "AutocastReport",
    "DynamicLossScale",
    "GradResult",
    "LossScale",
    "NoOpLossScale",
    "OpRow",
    "OpRules",
    "Policy",
    "StaticLossScale",
    "StepInfo",
    "Stepper",
    "TrainState",
    "all_finite",
    "autocast",
    "cast_to_full",
    "cast_to_half",
    "default_loss_scale",
    "default_op_rules",
    "dtype_to_names",
    "explain_autocast",
    "fastest_dtype",
    "fp32_state",
    "get_policy",
    "half_dtype",
    "make_evaluate",
    "make_step",
    "select_tree",
    "value_and_grad",
    "with_precision",
]
