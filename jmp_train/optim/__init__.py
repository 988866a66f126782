"""Optax transformations whose state is float32 whatever the parameters are."""

from jmp_train.optim.fp32_state import fp32_state
from jmp_train.optim.optimizers import OptimizerConfig, make_optimizer, make_schedule

__all__ = ["OptimizerConfig", "fp32_state", "make_optimizer", "make_schedule"]
