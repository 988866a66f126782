"""Functional mixed-precision training for JAX and Flax."""

from jmp_train.precision.dtypes import half_dtype
from jmp_train.precision.policy import Policy, cast_to_full, cast_to_half, get_policy

__all__ = ["Policy", "cast_to_full", "cast_to_half", "get_policy", "half_dtype"]
