"""Diagnosis: a step replayed, and the first operation that went non-finite."""

from jmp_train.debug.nonfinite import first_nonfinite
from jmp_train.debug.report import NonFiniteOp, NonFiniteReport, OperandRange

__all__ = ["NonFiniteOp", "NonFiniteReport", "OperandRange", "first_nonfinite"]
