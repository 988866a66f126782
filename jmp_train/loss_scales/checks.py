"""Checks and conversions of the numbers that a loss scale is constructed from."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jmp_train.numerics.dtypes import is_floating
from jmp_train.types import PyTree


def static_number(value: PyTree, name: str) -> float:
    """Convert a number or a concrete scalar array to a Python float, which is hashable.

    A float, because JAX reads a Python integer as int32 and refuses 2**32.

    Raises:
      TypeError: for a traced value, and for a value that is not a number.
    """
    if isinstance(value, Tracer):
        raise TypeError(f"{name} is traced; expected a number, because it is static under jit")
    array = np.asarray(value)
    if array.size != 1 or not (is_floating(array.dtype) or array.dtype.kind in "iub"):
        raise TypeError(f"{name} is {value!r}; expected a number")
    return float(array.item())


def whole_number(value: float, name: str) -> int:
    """Convert a float to an int, and raise ValueError if it has a fraction."""
    if not value.is_integer():
        raise ValueError(f"{name} is {value}; expected a whole number of steps")
    return int(value)


def check_scale(value: PyTree, name: str) -> None:
    """Raise ValueError if a number cannot scale a loss in float32; None is an unknown number."""
    # XLA flushes numbers below the smallest normal one to zero.
    tiny = np.finfo(np.float32).tiny
    if value is not None and not tiny <= value < math.inf:
        raise ValueError(
            f"{name} is {value}; expected 0 < it < inf, and at least {tiny:.3g}, the smallest "
            "normal number of float32"
        )


def check_static_scale(value: float) -> None:
    """Raise ValueError if a number, rounded to float32, cannot scale a loss."""
    with np.errstate(over="ignore"):  # `check_scale` refuses infinity
        check_scale(float(np.float32(value)), "loss_scale")


def float32_scalar(value: PyTree, name: str) -> Any:
    """Convert a number to a float32 array, and a JAX array to float32 or wider.

    A weakly typed scale would multiply a float16 loss in float16, where 65,536 is infinite.
    """
    warn_if_not_floating(value, name)
    value = _scalar(
        value, name, "a number", lambda dtype: is_floating(dtype) or dtype.kind in "iub"
    )
    if isinstance(value, jax.Array):
        return value.astype(jnp.promote_types(value.dtype, jnp.float32))
    with np.errstate(over="ignore"):  # `check_scale` refuses infinity
        return np.asarray(value, np.float32)


def int32_scalar(value: PyTree, name: str, highest: int) -> Any:
    """Convert an integer to an int32 array and check its range.

    A weakly typed integer would make the second step recompile.
    """
    value = _scalar(value, name, "a whole number", lambda dtype: dtype.kind in "iu")
    number = known(value)
    if number is not None and not 0 <= number <= highest:
        raise ValueError(f"{name} is {number}; expected 0 to {highest}")
    return value if isinstance(value, jax.Array) else np.asarray(value, np.int32)


def _scalar(value: PyTree, name: str, expected: str, accepts: Callable[[np.dtype], bool]) -> Any:
    """Return a JAX array unchanged, traced or not, and any other value as a NumPy array."""
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    if not accepts(array.dtype) and type(value) is not int:  # NumPy holds 2**64 as an object
        given = f"of {array.dtype}" if isinstance(value, jax.Array) else repr(value)
        raise TypeError(f"{name} is {given}; expected {expected}")
    if array.shape != ():
        raise ValueError(f"{name} has shape {array.shape}; expected a scalar, of shape ()")
    return array


def known(value: PyTree) -> Any:
    """Return the number in an array of shape (), or None if it cannot be read here."""
    if isinstance(value, Tracer):
        return None
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return None
    return np.asarray(value)[()]


def warn_if_not_floating(value: PyTree, name: str) -> None:
    """Warn, as jmp does, about an array that is not floating."""
    dtype = getattr(value, "dtype", None)
    if dtype is not None and not is_floating(dtype):
        warnings.warn(f"Expected floating type for {name}, got {dtype}", stacklevel=4)
