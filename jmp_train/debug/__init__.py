"""Diagnosis: a step replayed, and the first operation that went non-finite."""

from jmp_train.debug.nonfinite import NonFiniteOp, NonFiniteReport, first_nonfinite

__all__ = ["NonFiniteOp", "NonFiniteReport", "first_nonfinite"]
