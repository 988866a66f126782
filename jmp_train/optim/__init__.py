"""Optax transformations for mixed precision: float32 state, narrow parameters, loss scaling."""

from jmp_train.optim.bf16_remainder import Bf16RemainderState, bf16_remainder
from jmp_train.optim.config import OptimizerConfig
from jmp_train.optim.fp32_state import fp32_state
from jmp_train.optim.kahan import KahanState, kahan
from jmp_train.optim.loss_scaling import LossScalingState, loss_scaling, scale_loss
from jmp_train.optim.master_weights import MasterWeightsState, master_weights
from jmp_train.optim.narrow_parameters import BitUpdate
from jmp_train.optim.optimizers import check_parameters, make_optimizer
from jmp_train.optim.schedules import make_schedule
from jmp_train.optim.stochastic_rounding import StochasticRoundingState, stochastic_rounding

__all__ = [
    "Bf16RemainderState",
    "BitUpdate",
    "KahanState",
    "LossScalingState",
    "MasterWeightsState",
    "OptimizerConfig",
    "StochasticRoundingState",
    "bf16_remainder",
    "check_parameters",
    "fp32_state",
    "kahan",
    "loss_scaling",
    "make_optimizer",
    "make_schedule",
    "master_weights",
    "scale_loss",
    "stochastic_rounding",
]
