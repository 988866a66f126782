"""Floating values of the program as arrays: each array in every dtype that it has been cast to.

One array is cast to one dtype once. A weight that a scan reads in half precision goes in twice:
rounded once outside, as a constant without a gradient, and as it is, for the gradient alone
(`_hoisted_cast`). So the cast is not repeated, and yet the loop sums its gradient in the weight's
own dtype; XLA drops what is not read.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax import lax

from jmp_train._autocast.kinds import Kind
from jmp_train._jaxpr.compat import Operand


@jax.custom_jvp
def _hoisted_cast(source: Operand, copy: Operand) -> Any:
    """Return `copy`, which is `source` cast outside a loop; its gradient is that of the cast."""
    del source
    return copy


@_hoisted_cast.defjvp
def _hoisted_cast_jvp(primals: Any, tangents: Any) -> Any:
    copy = primals[1]
    return copy, lax.convert_element_type(tangents[0], copy.dtype)


class Arrays:
    """One array, in every dtype that it has been requested in.

    Args:
      base: the dtype of the narrowest array that is exact.
      by_dtype: the arrays.
      copies: arrays that came from outside the loop and have no gradient.
    """

    __slots__ = ("base", "by_dtype", "copies")

    def __init__(self, base: np.dtype, by_dtype: dict[np.dtype, Any], copies: Any = ()):
        self.base = base
        self.by_dtype = by_dtype
        self.copies: dict[np.dtype, Any] = dict(copies)

    def has(self, dtype: np.dtype) -> bool:
        return dtype in self.by_dtype or dtype in self.copies

    def get(self, dtype: np.dtype) -> Any:
        if dtype not in self.by_dtype:
            source = self.by_dtype[self.base]
            if dtype in self.copies:
                self.by_dtype[dtype] = _hoisted_cast(source, self.copies[dtype])
            else:
                self.by_dtype[dtype] = _cast(source, dtype)
        return self.by_dtype[dtype]

    def copy(self, dtype: np.dtype) -> Any:
        """Return the array in a dtype, to go into a loop without its gradient."""
        if dtype not in self.copies:
            self.copies[dtype] = lax.stop_gradient(self.get(dtype))
        return self.copies[dtype]


def _cast(x: Operand, dtype: np.dtype) -> Any:
    if not isinstance(x, jax.Array) and np.ndim(x) == 0:
        return np.asarray(x).astype(dtype)  # a literal stays one
    return lax.convert_element_type(x, dtype)


class Value:
    """A floating value of the program: its kind and its arrays."""

    __slots__ = ("arrays", "kind")

    def __init__(self, kind: Kind, arrays: Arrays):
        self.kind = kind
        self.arrays = arrays

    def get(self, dtype: np.dtype) -> Any:
        return self.arrays.get(dtype)


def value_of(kind: Kind | None, x: Operand) -> Any:
    """Return a `Value` of the array x in its base dtype; x itself where it is not floating."""
    if kind is None:
        return x
    x = x if x.dtype == kind.base else _cast(x, kind.base)
    return Value(kind, Arrays(kind.base, {kind.base: x}))


def kind_of(value: Operand) -> Kind | None:
    return value.kind if isinstance(value, Value) else None


def exact_array(value: Operand) -> Any:
    """Return the array that represents a value exactly."""
    return value.get(value.kind.base) if isinstance(value, Value) else value


def array_of_kind(value: Operand, kind: Kind | None) -> Any:
    """Return the array of a value in a kind's base dtype; unchanged if it is not floating."""
    return value.get(kind.base) if kind and isinstance(value, Value) else exact_array(value)


def array_in(value: Operand, dtype: Any) -> Any:
    """Return the array of a value in a dtype; unchanged if it is not floating."""
    return value.get(np.dtype(dtype)) if isinstance(value, Value) else value
