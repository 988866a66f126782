"""Assertions for tests of precision-sensitive code: dtypes, costs, compilations and bits."""

from jmp_train.testing.bits import assert_same_bits
from jmp_train.testing.compilations import assert_one_compilation
from jmp_train.testing.dtypes import (
    assert_contractions_in,
    assert_no_dtype,
    assert_reductions_in,
)
from jmp_train.testing.programs import assert_costs_nothing, assert_no_host_sync

__all__ = [
    "assert_contractions_in",
    "assert_costs_nothing",
    "assert_no_dtype",
    "assert_no_host_sync",
    "assert_one_compilation",
    "assert_reductions_in",
    "assert_same_bits",
]
