"""Finds overflow and underflow of a function in a narrow format, before it trains in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jmp_train._autocast.traced import TracedFunction
from jmp_train._autocast.transform import autocast
from jmp_train._jaxpr.compat import Equation, Operand
from jmp_train._jaxpr.equations import Place
from jmp_train.numerics.dtypes import parse_dtype
from jmp_train.testing.wide import widen
from jmp_train.testing.worst import describe, observe, wide_results
from jmp_train.types import DTypeLike, Function


def assert_no_overflow(fn: Function, *args: Any, dtype: DTypeLike = "float16") -> None:
    """Assert that no operation overflows when a function runs under autocast in a format.

    The function runs operation by operation, each rounded as the program says, with every loop
    iteration and derivative rule that its arguments lead to. An operation overflows if a result in
    `dtype` is infinite or NaN where the same operation in float64, on the same operands, is finite;
    casts to `dtype` count. An infinity that the function was given or wrote, such as a mask, is
    passed over, and an overflow is found even if nothing reads it.

    Args:
      fn: a function of arrays; `jax.grad` of a loss to test the backward pass too.
      *args: its arguments, pytrees; leaves that are not arrays reach it unchanged.
      dtype: `"float16"`, `"bfloat16"`, or `"float32"` for the function as it stands.

    Raises:
      AssertionError: with the first operation that overflows, its place and the magnitude that it
        reaches in float64.
      ValueError: for another format.

    >>> import jax.numpy as jnp
    >>> def loss(w, x):
    ...     return jnp.sum(jnp.tanh(x @ w))
    >>> assert_no_overflow(loss, jnp.full((4, 4), 100.0), jnp.ones((2, 4)))
    >>> assert_no_overflow(loss, jnp.full((4, 4), 1e5), jnp.ones((2, 4)))
    Traceback (most recent call last):
    AssertionError: ...
    """
    dtype = parse_dtype(dtype)

    def check(
        low: np.ndarray, wide: Callable[[], np.ndarray], operation: Callable[[], str]
    ) -> None:
        bad = ~np.isfinite(low)
        if not bad.any():
            return
        lost = bad & np.isfinite(wide())
        if lost.any():
            largest, limit = float(np.abs(wide()[lost]).max()), float(jnp.finfo(dtype).max)
            raise AssertionError(
                f"assert_no_overflow: expected values within {dtype.name} (largest {limit:.5g}); "
                f"found {largest:.4g} ({int(lost.sum())} of {low.size} values overflow) in {operation()}"
            )

    _check_each(fn, args, dtype, check)


def assert_no_underflow(
    fn: Function, *args: Any, dtype: DTypeLike = "float16", share: float = 1e-3
) -> None:
    """Assert that few values fall to zero when a function runs under autocast in a format.

    As in `assert_no_overflow`, each operation is compared with itself in float64 on the same
    operands. A value underflows if it is zero in `dtype` and not in float64; of float16 these are
    magnitudes of at most 2^-25, about 3e-8. Subnormal numbers do not count, unless the device flushes
    them to zero. To test gradients, multiply the loss by the loss scale first.

    Args:
      fn: a function of arrays.
      *args: its arguments, pytrees; leaves that are not arrays reach it unchanged.
      dtype: `"float16"`, `"bfloat16"`, or `"float32"` for the function as it stands.
      share: largest share of underflowing values among the values of one array that are not zero in
        float64.

    Raises:
      AssertionError: with the first operation that loses more than that share, and its share.
      ValueError: for another format.

    >>> import jax, jax.numpy as jnp
    >>> def loss(w, x, scale):
    ...     return scale * jnp.mean(x @ w)
    >>> w, x = jnp.ones(4), jnp.full((2, 4), 1e-4)
    >>> assert_no_underflow(jax.grad(loss), w, x, 1024.0)
    >>> assert_no_underflow(jax.grad(loss), w, x, 1e-4)
    Traceback (most recent call last):
    AssertionError: ...
    """
    dtype = parse_dtype(dtype)

    def check(
        low: np.ndarray, wide: Callable[[], np.ndarray], operation: Callable[[], str]
    ) -> None:
        if low.all():
            return
        nonzero = wide() != 0
        lost = nonzero & (low == 0)
        found = lost.sum() / max(nonzero.sum(), 1)
        if found > share:
            largest = float(np.abs(wide()[lost]).max())
            raise AssertionError(
                f"assert_no_underflow: expected at most {share:.3g} of the values to fall to zero in "
                f"{dtype.name}; found {found:.3g} ({int(lost.sum())} of {int(nonzero.sum())}, up to "
                f"{largest:.3g}) in {operation()}"
            )

    _check_each(fn, args, dtype, check)


def _check_each(
    fn: Function, args: Any, dtype: np.dtype, check: Callable[[np.ndarray, Any, Any], None]
) -> None:
    """Call `check(result, wide, operation)` for each result in a format.

    `wide()` is the operation's result in float64, `operation()` its description.
    """

    def hook(eqn: Equation, operands: list[Operand], outs: list[Operand], place: Place) -> None:
        for n, out in enumerate(outs):
            if out.dtype == dtype:
                check(
                    np.asarray(widen(out)),
                    lambda n=n: wide_results(eqn, operands)[n],
                    lambda: describe(eqn, place, dtype.name),
                )

    observe(TracedFunction(autocast(fn, dtype), args, {}), hook)
