"""Floating-point formats, rounding, and the share of numbers that a format would lose."""

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

__all__ = [
    "ExponentHistogram",
    "FormatShares",
    "dtype_to_names",
    "exponent_histogram",
    "fastest_dtype",
    "half_dtype",
    "join_bf16_remainder",
    "kahan_add",
    "round_to_nearest",
    "shares_in",
    "split_bf16_remainder",
    "stochastic_round",
]
