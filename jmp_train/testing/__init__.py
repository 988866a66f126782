"""Assertions about precision, for tests: dtypes, errors, ranges, compilations, cost and training."""

from jmp_train.testing.bits import assert_same_bits
from jmp_train.testing.compilations import assert_one_compilation
from jmp_train.testing.dtypes import assert_contractions_in, assert_no_dtype, assert_reductions_in
from jmp_train.testing.float64 import assert_close_to_float64
from jmp_train.testing.gradients import assert_gradients_close
from jmp_train.testing.programs import assert_costs_nothing, assert_no_host_sync
from jmp_train.testing.ranges import assert_no_overflow, assert_no_underflow
from jmp_train.testing.training import assert_equivalent_training, equivalence
from jmp_train.testing.variants import policies

__all__ = [
    "assert_close_to_float64",
    "assert_contractions_in",
    "assert_costs_nothing",
    "assert_equivalent_training",
    "assert_gradients_close",
    "assert_no_dtype",
    "assert_no_host_sync",
    "assert_no_overflow",
    "assert_no_underflow",
    "assert_one_compilation",
    "assert_reductions_in",
    "assert_same_bits",
    "equivalence",
    "policies",
]
