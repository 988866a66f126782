"""Assertions about precision, for tests."""

from jmp_train.testing.float64 import assert_close_to_float64
from jmp_train.testing.gradients import assert_gradients_close
from jmp_train.testing.ranges import assert_no_overflow, assert_no_underflow
from jmp_train.testing.training import assert_equivalent_training, equivalence
from jmp_train.testing.variants import policies

__all__ = [
    "assert_close_to_float64",
    "assert_equivalent_training",
    "assert_gradients_close",
    "assert_no_overflow",
    "assert_no_underflow",
    "equivalence",
    "policies",
]
