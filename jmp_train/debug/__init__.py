"""Diagnosis: the first operation that went non-finite, and what autocast did."""

from jmp_train._autocast.transform import AutocastReport, OpRow, explain_autocast
from jmp_train.debug.nonfinite import NonFiniteOp, NonFiniteReport, first_nonfinite

__all__ = [
    "AutocastReport",
    "NonFiniteOp",
    "NonFiniteReport",
    "OpRow",
    "explain_autocast",
    "first_nonfinite",
]
