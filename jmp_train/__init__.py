"""jmp_train: mixed-precision training for JAX and Flax, in pure functions."""

from jmp_train._autocast.op_rules import OpRules, default_op_rules
from jmp_train._autocast.regions import with_precision
from jmp_train._autocast.report import AutocastReport, OpRow, explain_autocast
from jmp_train._autocast.transform import autocast
from jmp_train.debug import NonFiniteOp, NonFiniteReport, first_nonfinite
from jmp_train.loss_scales.interchange import (
    loss_scale_from_dict,
    loss_scale_from_gradscaler,
    loss_scale_to_dict,
)
from jmp_train.loss_scales.states import DynamicLossScale, LossScale, NoOpLossScale, StaticLossScale
from jmp_train.numerics.dtypes import dtype_to_names, fastest_dtype, half_dtype
from jmp_train.numerics.histograms import (
    ExponentHistogram,
    FormatShares,
    exponent_histogram,
    shares_in,
)
from jmp_train.numerics.rounding import (
    join_bf16_remainder,
    kahan_add,
    round_to_nearest,
    split_bf16_remainder,
    stochastic_round,
)
from jmp_train.optim.bf16_remainder import bf16_remainder
from jmp_train.optim.fp32_state import fp32_state
from jmp_train.optim.kahan import kahan
from jmp_train.optim.loss_scaling import loss_scaling, scale_loss
from jmp_train.optim.master_weights import master_weights
from jmp_train.optim.stochastic_rounding import stochastic_rounding
from jmp_train.policy.policy import Policy, get_policy
from jmp_train.policy.precision import default_loss_scale
from jmp_train.step.accumulation import WeightedLoss
from jmp_train.step.evaluation import make_evaluate
from jmp_train.step.gradients import GradResult, value_and_grad
from jmp_train.step.state import LastSkip, StepInfo, TrainState
from jmp_train.step.step import Stepper, make_step
from jmp_train.tree import all_finite, cast_to_full, cast_to_half, select_tree

__all__ = [
    "AutocastReport",
    "DynamicLossScale",
    "ExponentHistogram",
    "FormatShares",
    "GradResult",
    "LastSkip",
    "LossScale",
    "NoOpLossScale",
    "NonFiniteOp",
    "NonFiniteReport",
    "OpRow",
    "OpRules",
    "Policy",
    "StaticLossScale",
    "StepInfo",
    "Stepper",
    "TrainState",
    "WeightedLoss",
    "all_finite",
    "autocast",
    "bf16_remainder",
    "cast_to_full",
    "cast_to_half",
    "default_loss_scale",
    "default_op_rules",
    "dtype_to_names",
    "explain_autocast",
    "exponent_histogram",
    "fastest_dtype",
    "first_nonfinite",
    "fp32_state",
    "get_policy",
    "half_dtype",
    "join_bf16_remainder",
    "kahan",
    "kahan_add",
    "loss_scale_from_dict",
    "loss_scale_from_gradscaler",
    "loss_scale_to_dict",
    "loss_scaling",
    "make_evaluate",
    "make_step",
    "master_weights",
    "round_to_nearest",
    "scale_loss",
    "select_tree",
    "shares_in",
    "split_bf16_remainder",
    "stochastic_round",
    "stochastic_rounding",
    "value_and_grad",
    "with_precision",
]
