"""Finds overflow and underflow of a function in a narrow format, before it trains in it."""

from __future__ import annotations

import cmath
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from jmp_train._autocast.traced import TracedFunction
from jmp_train._autocast.transform import autocast
from jmp_train._jaxpr.compat import Equation, Operand
from jmp_train._jaxpr.equations import Place
from jmp_train._jaxpr.source import own_line
from jmp_train.numerics.dtypes import parse_dtype
from jmp_train.testing.wide import check_call, is_foreign, on_host, wide_dtype
from jmp_train.testing.worst import describe, observe, wide_results
from jmp_train.types import DTypeLike, Function

_ARITHMETIC = frozenset({"add", "add_any", "sub", "mul", "div"})


def assert_no_overflow(fn: Function, *args: Any, dtype: DTypeLike | None = "float16") -> None:
    """Assert that no operation overflows when a function runs under autocast in a format.

    The function runs operation by operation, each rounded as the program says, with every loop
    iteration and derivative rule that its arguments lead to. An operation overflows if a result in
    `dtype` is infinite or NaN where the same operation in float64, on the same operands, is finite;
    casts to `dtype` count. A complex number counts as two, its real and its imaginary part. An
    infinity that the function was given or wrote, such as a mask, is passed over, and an overflow is
    found even if nothing reads it.

    `shard_map`, `pmap`, the function of `x.at[i].apply`, and `reduce` and `reduce_window` with a
    computation count as one operation: an overflow within is found where it reaches the result.
    Pallas kernels, callbacks, foreign functions and the samplers of `jax.random` have no float64: they
    fail if a result is infinite or NaN where all operands are finite. What `jax.ref.addupdate` adds in
    place is not tested.

    A Python number above the limit becomes an infinity as JAX reads it: `x + 1e6` is `x + inf` for x in
    float16. Infinite numbers in the code fail in sums, differences, products and quotients; elsewhere
    (`where(mask, x, -1e9)`) they are masks and pass.

    Args:
      fn: a function of arrays; `jax.grad` of a loss to test the backward pass too.
      *args: its arguments, pytrees; leaves that are not arrays reach it unchanged.
      dtype: `"float16"`, `"bfloat16"` or `"float32"`, for the function under autocast; None for the
        function as it stands, whose results in every floating or complex dtype are tested.

    Raises:
      AssertionError: with the first operation that overflows, its place and the magnitude that it
        reaches in float64; if no operation has a result in `dtype`, since autocast lowers matrix
        products alone, and what reads them: then pass arguments in `dtype`.
      ValueError: for another format.
      TypeError: if `fn` is not a function, or if an argument is a `jax.ShapeDtypeStruct`.

    >>> import jax.numpy as jnp
    >>> def loss(w, x):
    ...     return jnp.sum(jnp.tanh(x @ w))
    >>> assert_no_overflow(loss, jnp.full((4, 4), 100.0), jnp.ones((2, 4)))
    >>> assert_no_overflow(loss, jnp.full((4, 4), 1e5), jnp.ones((2, 4)))
    Traceback (most recent call last):
    AssertionError: ...
    """
    dtype = None if dtype is None else parse_dtype(dtype)
    within = "their dtypes" if dtype is None else f"{dtype.name} (largest {_largest(dtype):.5g})"
    expected = f"assert_no_overflow: expected values within {within}"

    def check(result: Result) -> None:
        number = _infinite_number(result.eqn)
        if number is not None:
            raise AssertionError(
                f"{expected}; found the number {number} in the code (a larger number than that becomes "
                f"infinite) in {result.describe()}"
            )
        bad = ~np.isfinite(result.low)
        if not bad.any():
            return
        if is_foreign(result.eqn) and all(map(_all_finite, result.operands)):
            raise AssertionError(
                f"{expected}; found {int(bad.sum())} of {bad.size} values infinite or NaN, from finite "
                f"operands, in {result.describe()}"
            )
        lost = bad & np.isfinite(result.wide())
        if lost.any():
            largest = float(np.abs(result.wide()[lost]).max())
            raise AssertionError(
                f"{expected}; found {largest:.4g} ({int(lost.sum())} of {bad.size} values overflow) "
                f"in {result.describe()}"
            )

    _check_each("assert_no_overflow", fn, args, dtype, check)


def assert_no_underflow(
    fn: Function, *args: Any, dtype: DTypeLike = "float16", share: float = 1e-3
) -> None:
    """Assert that few values fall to zero when a function runs under autocast in a format.

    As in `assert_no_overflow`, each operation is compared with itself in float64 on the same
    operands. A value underflows if it is zero in `dtype` and not in float64; of float16 these are
    magnitudes of at most 2^-25, about 3e-8. Subnormal numbers do not count, unless the device flushes
    them to zero. To test gradients, multiply the loss by the loss scale first.

    Pallas kernels, callbacks, foreign functions and the samplers of `jax.random` have no float64 and
    are passed over. So are numbers in the code that are zero in `dtype`, such as the 1e-8 of
    `x / (y + 1e-8)` with y in float16: JAX has made them zeros before they can be read.

    Args:
      fn: a function of arrays.
      *args: its arguments, pytrees; leaves that are not arrays reach it unchanged.
      dtype: `"float16"`, `"bfloat16"`, or `"float32"` for the function as it stands.
      share: largest share of underflowing values among the values of one array that are not zero in
        float64; at least 0 and below 1.

    Raises:
      AssertionError: with the first operation that loses more than that share, and its share; if no
        operation has a result in `dtype`, as in `assert_no_overflow`.
      ValueError: for another format or share.
      TypeError: if `fn` is not a function, or if an argument is a `jax.ShapeDtypeStruct`.

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
    if not 0 <= share < 1:
        raise ValueError(f"share is {share}; expected a number from 0 to below 1, such as 0.001")

    def check(result: Result) -> None:
        if result.low.all():
            return
        magnitudes = np.abs(result.wide())
        nonzero = magnitudes != 0
        lost = nonzero & (result.low == 0) & (magnitudes < float(jnp.finfo(dtype).smallest_normal))
        found = lost.sum() / max(nonzero.sum(), 1)
        if found > share:
            largest = float(magnitudes[lost].max())
            raise AssertionError(
                f"assert_no_underflow: expected at most {share:.3g} of the values to fall to zero in "
                f"{dtype.name}; found {found:.3g} ({int(lost.sum())} of {int(nonzero.sum())}, up to "
                f"{largest:.3g}) in {result.describe()}"
            )

    _check_each("assert_no_underflow", fn, args, dtype, check)


class Result(NamedTuple):
    """A result of an operation in the format to check.

    Attributes:
      low: the numbers of the result, exactly, in float64; the parts of complex ones.
      wide: `wide()` is the result of the same operation in float64.
      eqn: the operation.
      operands: its operands.
      describe: `describe()` names the operation, its place and line.
    """

    low: np.ndarray
    wide: Callable[[], np.ndarray]
    eqn: Equation
    operands: Sequence[Operand]
    describe: Callable[[], str]


def _check_each(
    name: str, fn: Function, args: Any, dtype: np.dtype | None, check: Callable[[Result], None]
) -> None:
    """Call `check` for each result in a format, None for all; fail if there is none."""
    check_call(name, fn, args)
    sources: dict[Any, tuple[Equation, Place]] = {}  # the operation that each variable is from
    found = False

    def hook(eqn: Equation, operands: list[Operand], outs: list[Operand], place: Place) -> None:
        nonlocal found
        sources.update((v, (eqn, place)) for v in eqn.outvars)
        for n, out in enumerate(outs):
            if out.size and _is_in(out, dtype):
                found = True
                low, wide = _parts(out), lambda n=n: _parts(wide_results(eqn, operands)[n])
                describe_it = lambda out=out: _description(eqn, place, out.dtype.name, sources)
                check(Result(low, wide, eqn, operands, describe_it))

    observe(TracedFunction(fn if dtype is None else autocast(fn, dtype), args, {}), hook)
    if not found and dtype is None:
        raise AssertionError(f"{name}: found no operation with a result in a floating dtype")
    if not found and dtype is not None:
        raise AssertionError(
            f"{name}: found no operation with a result in {dtype.name}: autocast lowers matrix products "
            f"and what reads them; pass arguments in {dtype.name}, or a function that casts"
        )


def _description(
    eqn: Equation, place: Place, dtype: str, sources: Mapping[Any, tuple[Equation, Place]]
) -> str:
    """Describe an operation; for a cast that autocast added to a result, the operation before it too."""
    description, source = describe(eqn, place, dtype), eqn
    while source.primitive.name == "convert_element_type" and not own_line(source):
        atom = source.invars[0]
        if isinstance(atom, Literal) or atom not in sources:
            return description
        source, place = sources[atom]
    if source is eqn:
        return description
    return f"{description} of the result of {describe(source, place, source.outvars[0].aval.dtype.name)}"


def _largest(dtype: np.dtype) -> float:
    return float(jnp.finfo(dtype).max)


def _infinite_number(eqn: Equation) -> float | complex | None:
    """Return an infinite number in the code that an operation calculates with, None if there is none."""
    if eqn.primitive.name not in _ARITHMETIC:
        return None
    literals = (np.asarray(v.val) for v in eqn.invars if isinstance(v, Literal))
    numbers = (on_host(x).item() for x in literals if wide_dtype(x.dtype) is not None)
    return next((x for x in numbers if cmath.isinf(x)), None)


def _is_in(x: Operand, dtype: np.dtype | None) -> bool:
    """Return whether an array, or the parts of a complex one, are in a format; None for any format."""
    return wide_dtype(x.dtype) is not None and dtype in (None, jnp.finfo(x.dtype).dtype)


def _parts(x: Operand) -> np.ndarray:
    """Return the numbers of an array in float64; real and imaginary parts of a complex one."""
    wide = on_host(x)
    return np.stack([wide.real, wide.imag], -1) if np.iscomplexobj(wide) else wide


def _all_finite(x: Operand) -> bool:
    return wide_dtype(x.dtype) is None or bool(np.isfinite(on_host(x)).all())
