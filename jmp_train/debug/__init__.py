"""Diagnosis: the first operation that went non-finite, and what autocast did."""

from jmp_train._autocast.report import AutocastReport, OpRow, explain_autocast
from jmp_train.debug.nonfinite import first_nonfinite
from jmp_train.debug.report import NonFiniteOp, NonFiniteReport, OperandRange

__all__ = [
    "AutocastReport",
    "NonFiniteOp",
    "NonFiniteReport",
    "OpRow",
    "OperandRange",
    "explain_autocast",
    "first_nonfinite",
]
