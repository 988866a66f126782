"""Finds overflow and underflow of a function in a narrow format, before it trains in it."""

from __future__ import annotations

import cmath
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
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

V = TypeVar("V")

_ARITHMETIC = frozenset({"add", "add_any", "sub", "mul", "div"})
# Operations without poles: if their operands are finite and the result in float64 is not, it overflows.
_ELEMENTWISE = frozenset(
    {"add", "add_any", "cosh", "exp", "exp2", "expm1", "integer_pow", "mul", "pow", "sinh", "square", "sub"}
)  # fmt: skip
_OF_MANY = frozenset(
    {"conv_general_dilated", "cumprod", "cumsum", "dot_general", "reduce_prod", "reduce_sum"}
)


def assert_no_overflow(fn: Function, *args: Any, dtype: DTypeLike | None = "float16") -> None:
    """Assert that no operation overflows when a function runs under autocast in a format.

    The function runs operation by operation, each rounded as the program says, with every loop
    iteration and derivative rule that its arguments lead to. An operation overflows if a result in
    `dtype`, or in a wider dtype that autocast keeps it in, is infinite or NaN where the same operation
    on the same operands is finite in float64, or would be in a format of any range; casts to `dtype`
    count. A complex number counts as two, its real and its imaginary part. An infinity that the
    function was given or wrote, such as a mask or `1 / 0`, is passed over, and an overflow is found even
    if nothing reads it.

    `shard_map`, `pmap`, the function of `x.at[i].apply`, and `reduce` and `reduce_window` with a
    computation count as one operation: an overflow within is found where it reaches the result.
    Pallas kernels, callbacks, foreign functions and the samplers of `jax.random` have no float64: they
    fail if a result in `dtype` is infinite or NaN where all operands are finite. What `jax.ref.addupdate` adds in
    place is not tested.

    A Python number above the limit becomes an infinity as JAX reads it: `x + 1e6` is `x + inf` for x in
    float16. Infinite numbers in the code fail in sums, differences, products and quotients in `dtype`; elsewhere
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
        number = None if result.is_wider else _infinite_number(result.eqn)
        if number is not None:
            raise AssertionError(
                f"{expected}; found the number {number} in the code (a larger number than that becomes "
                f"infinite) in {result.describe()}"
            )
        bad = ~np.isfinite(result.low)
        if not bad.any():
            return
        if result.is_wider and is_foreign(result.eqn):
            return
        if is_foreign(result.eqn) and all(map(_all_finite, result.operands)):
            raise AssertionError(
                f"{expected}; found {int(bad.sum())} of {bad.size} values infinite or NaN, from finite "
                f"operands, in {result.describe()}"
            )
        wide = result.wide()
        lost = bad & (np.isfinite(wide) | _overflows_float64(result, wide))
        if (
            result.is_wider
        ):  # the logarithm of a number that the device flushes to zero is infinite too
            lost &= np.abs(wide) > _largest(result.out.dtype)
        if lost.any():
            largest = float(np.abs(wide[lost]).max())
            reached = f"{largest:.4g}" if np.isfinite(largest) else "more than 1.8e+308"
            raise AssertionError(
                f"{expected}; found {reached} ({int(lost.sum())} of {bad.size} values overflow) in "
                f"{result.describe()}"
            )

    _check_each("assert_no_overflow", fn, args, dtype, check)


def assert_no_underflow(
    fn: Function, *args: Any, dtype: DTypeLike = "float16", share: float = 1e-3
) -> None:
    """Assert that few values fall to zero when a function runs under autocast in a format.

    As in `assert_no_overflow`, each operation is compared with itself in float64 on the same
    operands. A value underflows if it is zero in `dtype` and not in float64; of float16 these are
    magnitudes of at most 2^-25, about 3e-8. A float32 result that falls to zero and is cast to `dtype` as
    it is counts too. Subnormal numbers do not count, unless the device flushes them to zero. To test
    gradients, multiply the loss by the loss scale first.

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

    fell = _ByArray[np.ndarray]()  # magnitudes of what fell to zero in a wider dtype

    def check(result: Result) -> None:
        if result.low.all() or is_foreign(result.eqn):
            return
        magnitudes = np.abs(result.wide())
        smallest = float(jnp.finfo(result.out.dtype).smallest_normal)
        lost = (magnitudes != 0) & (result.low == 0) & (magnitudes < smallest)
        if result.is_wider:
            if lost.any():
                fell.put(result.out, np.where(lost, magnitudes, 0.0))
            return
        before = fell.of(result.operands[0]) if _is_cast(result.eqn) else None
        if before is not None:
            magnitudes = np.maximum(magnitudes, before)
            lost |= before > 0
        nonzero = magnitudes != 0
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
    """A result of an operation in the format to check, or in a wider one.

    Attributes:
      out: the result.
      is_wider: whether it is in a wider format.
      low: its numbers, exactly, in float64; the parts of complex ones.
      wide: `wide()` is the result of the same operation in float64.
      eqn: the operation.
      operands: its operands.
      describe: `describe()` names the operation, its place and line.
    """

    out: Operand
    is_wider: bool
    low: np.ndarray
    wide: Callable[[], np.ndarray]
    eqn: Equation
    operands: Sequence[Operand]
    describe: Callable[[], str]


class _ByArray(Generic[V]):
    """Values by arrays, which have no hash, for as long as the arrays live."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[weakref.ref[Any], V]] = {}

    def put(self, array: Operand, value: V) -> None:
        key = id(array)
        self._found[key] = (weakref.ref(array, lambda _: self._found.pop(key, None)), value)

    def of(self, array: Operand) -> V | None:
        return self._found[id(array)][1] if id(array) in self._found else None


class _Source(NamedTuple):
    """The operation that an array is from; for a cast, where what it casts is from too."""

    eqn: Equation
    place: Place
    cast_from: _Source | None


def _check_each(
    name: str, fn: Function, args: Any, dtype: np.dtype | None, check: Callable[[Result], None]
) -> None:
    """Call `check` for each result in a format or a wider one, None for all; fail if the format has none."""
    check_call(name, fn, args)
    sources = _ByArray[_Source]()
    found = False

    def hook(eqn: Equation, operands: list[Operand], outs: list[Operand], place: Place) -> None:
        nonlocal found
        source = _Source(eqn, place, sources.of(operands[0]) if _is_cast(eqn) else None)
        for n, out in enumerate(outs):
            if isinstance(out, jax.Array):
                sources.put(out, source)
            if out.size and wide_dtype(out.dtype) is not None:
                is_wider = dtype is not None and _bits(out.dtype) > _bits(dtype)
                if not (is_wider or _is_in(out, dtype)):
                    continue
                found |= not is_wider
                low, wide = _parts(out), lambda n=n: _parts(wide_results(eqn, operands)[n])
                describe_it = lambda out=out: _description(source, out.dtype.name)
                check(Result(out, is_wider, low, wide, eqn, operands, describe_it))

    observe(TracedFunction(fn if dtype is None else autocast(fn, dtype), args, {}), hook)
    if not found and dtype is None:
        raise AssertionError(f"{name}: found no operation with a result in a floating dtype")
    if not found and dtype is not None:
        raise AssertionError(
            f"{name}: found no operation with a result in {dtype.name}: autocast lowers matrix products "
            f"and what reads them; pass arguments in {dtype.name}, or a function that casts"
        )


def _description(source: _Source, dtype: str) -> str:
    """Describe an operation; for a cast that autocast added to a result, the operation before it too."""
    description, origin = describe(source.eqn, source.place, dtype), source
    while _is_cast(origin.eqn) and not own_line(origin.eqn):
        if origin.cast_from is None:
            return description
        origin = origin.cast_from
    if origin is source:
        return description
    dtype = origin.eqn.outvars[0].aval.dtype.name
    return f"{description} of the result of {describe(origin.eqn, origin.place, dtype)}"


def _overflows_float64(result: Result, wide: np.ndarray) -> np.ndarray:
    """Return which numbers are infinite in float64 and would not be in a format of any range."""
    name, operands = result.eqn.primitive.name, result.operands
    infinite = np.isinf(wide)
    if name not in _ELEMENTWISE | _OF_MANY or not infinite.any():
        return np.zeros_like(infinite)
    if name in _OF_MANY:
        return infinite & all(map(_all_finite, operands))
    values = [np.asarray(on_host(x)) for x in operands]
    finite = np.ones((), bool)
    for x in values:
        finite = finite & np.isfinite(x)
    if name in ("integer_pow", "pow"):  # zero has no negative powers
        finite = finite & (values[0] != 0)
    return infinite & (finite[..., None] if infinite.ndim > finite.ndim else finite)


def _is_cast(eqn: Equation) -> bool:
    return eqn.primitive.name == "convert_element_type"


def _bits(dtype: Any) -> int:
    return jnp.finfo(dtype).bits


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
