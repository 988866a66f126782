"""Strategies for hypothesis: numbers of a format by exponent, its special values, arrays, trees."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from jmp_train.numerics.dtypes import parse_dtype
from jmp_train.types import DTypeLike

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

_SHAPES = ((), (1,), (3,), (2, 3), (0,))


def floats(dtype: DTypeLike, *, subnormal: bool = True) -> SearchStrategy[Any]:
    """Return a strategy for finite numbers of a format, other than zero, drawn by exponent.

    The exponents, down to that of the smallest subnormal number, are about equally likely. Hypothesis
    draws a few of them more often: of 3,000 float16 numbers, none had an exponent more than 1.5 times as
    often as the mean; of bfloat16 numbers, one or two exponents came 13 times as often. float64 has
    2,098 exponents, of which 3,000 numbers had 1,306. Examples shrink towards 1.

    Args:
      dtype: a floating dtype, or its name.
      subnormal: whether to draw subnormal numbers.

    Returns:
      A strategy for NumPy scalars of that dtype.

    Raises:
      ValueError: for another dtype.
      ImportError: without hypothesis.

    >>> from hypothesis import given
    >>> @given(floats("float16"))
    ... def test_floats_are_finite_and_not_zero(x):
    ...     assert np.isfinite(x) and x != 0
    >>> test_floats_are_finite_and_not_zero()
    """
    st, dtype = _hypothesis(), parse_dtype(dtype)
    info = ml_dtypes.finfo(dtype)
    digits, least, largest = info.nmant, int(info.minexp), float(info.max)
    low = least - digits if subnormal else least

    def number(exponent: int, sign: int, fraction: int) -> Any:
        value = min(math.ldexp((1 << digits) + fraction, exponent - digits), largest)
        return np.asarray(sign * value).astype(dtype)[()]  # a subnormal number is rounded

    # By distance from 0, towards which examples shrink. `integers` prefers 0 and both ends.
    exponents = sorted(range(low, math.frexp(largest)[1]), key=lambda e: (abs(e), e < 0))
    drawn = st.sampled_from(exponents)
    return st.builds(number, drawn, st.sampled_from([1, -1]), st.integers(0, 2**digits - 1))


def special_values(dtype: DTypeLike) -> SearchStrategy[Any]:
    """Return a strategy for the values of a format at which code fails most often.

    These are, with both signs: zero, infinity, NaN with several payloads, the largest number, the
    smallest normal and subnormal numbers and the largest subnormal one, 1 and its neighbours; and
    the ties in rounding to narrower formats: near 1, at the limit of overflow, and at that of
    underflow.

    Args:
      dtype: a floating dtype, or its name.

    Returns:
      A strategy for NumPy scalars of that dtype.

    Raises:
      ValueError: for another dtype.
      ImportError: without hypothesis.

    >>> from hypothesis import find
    >>> find(special_values("float32"), lambda x: 1 < x < 1.0001)
    np.float32(1.0000001)
    """
    st, dtype = _hypothesis(), parse_dtype(dtype)
    return st.sampled_from(list(special_array(dtype)))


def special_array(dtype: DTypeLike) -> np.ndarray:
    """Return the values of `special_values` as an array."""
    dtype = parse_dtype(dtype)
    info = ml_dtypes.finfo(dtype)
    normal, tiny = float(info.smallest_normal), float(info.smallest_subnormal)
    eps = float(info.eps)
    numbers = [0.0, 1.0, 1 + eps, 1 - eps / 2, float(info.max), normal, normal - tiny, tiny]
    with np.errstate(all="ignore"):
        numbers += [x for x in _ties() if float(np.asarray(x).astype(dtype)) == x]
        values = np.array(list(dict.fromkeys(numbers)), dtype)
        return np.concatenate([values, -values, _not_finite(dtype)])


def arrays(
    dtype: DTypeLike,
    shape: int | Sequence[int] | SearchStrategy[int | Sequence[int]] = (3,),
    *,
    elements: SearchStrategy[Any] | None = None,
) -> SearchStrategy[np.ndarray]:
    """Return a strategy for small NumPy arrays of a format; JAX functions take them.

    Args:
      dtype: a floating dtype, or its name.
      shape: of the arrays, or their length, or a strategy for one of them.
      elements: a strategy for the elements; `floats(dtype)` by default.

    Raises:
      ValueError: for another dtype.
      TypeError: for a size that is not an integer.
      ImportError: without hypothesis.

    >>> from hypothesis import given
    >>> @given(arrays("bfloat16", (2, 3)))
    ... def test_arrays_have_their_shape(x):
    ...     assert x.shape == (2, 3) and x.dtype == "bfloat16"
    >>> test_arrays_have_their_shape()
    """
    st, dtype = _hypothesis(), parse_dtype(dtype)
    elements = floats(dtype) if elements is None else elements

    def of_shape(shape: Any) -> SearchStrategy[np.ndarray]:
        sizes = [*map(operator.index, shape if isinstance(shape, Iterable) else [shape])]
        size = math.prod(sizes)
        drawn = st.lists(elements, min_size=size, max_size=size)
        return drawn.map(lambda values: _packed(values, dtype).reshape(sizes))

    given: Any = shape
    return given.flatmap(of_shape) if isinstance(given, st.SearchStrategy) else of_shape(given)


def trees(
    dtypes: Sequence[DTypeLike] = ("float32", "bfloat16", "float16"),
    *,
    others: bool = True,
    max_leaves: int = 6,
) -> SearchStrategy[Any]:
    """Return a strategy for pytrees of arrays in mixed dtypes: dicts, lists, tuples and None.

    Args:
      dtypes: of the floating leaves.
      others: whether there are int32, uint8 and boolean leaves and None too.
      max_leaves: largest number of leaves.

    Raises:
      ValueError: for another dtype.
      ImportError: without hypothesis.

    >>> from hypothesis import given
    >>> from jmp_train.tree import cast_floating
    >>> @given(trees())
    ... def test_a_cast_keeps_shapes(tree):
    ...     before = [x.shape for x in jax.tree.leaves(tree)]
    ...     assert [x.shape for x in jax.tree.leaves(cast_floating(tree, "float32"))] == before
    >>> import jax
    >>> test_a_cast_keeps_shapes()
    """
    st = _hypothesis()
    shapes = st.sampled_from(_SHAPES)
    leaves = [arrays(dtype, shapes) for dtype in dtypes]
    if others:
        shape_and = lambda dtype: shapes.map(lambda shape: np.ones(shape, dtype))
        leaves += [st.none(), *map(shape_and, (np.int32, np.uint8, np.bool_))]
    nested = lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
    )
    return st.recursive(st.one_of(leaves), nested, max_leaves=max_leaves)


def _hypothesis() -> Any:
    try:
        from hypothesis import strategies
    except ImportError:
        raise ImportError(
            "jmp_train.testing.strategies needs hypothesis: pip install hypothesis"
        ) from None
    return strategies


def _ties() -> list[float]:
    """Return numbers half-way between two numbers of a narrow format."""
    ties = []
    for name in ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"):
        info = ml_dtypes.finfo(parse_dtype(name))
        eps, tiny = float(info.eps), float(info.smallest_subnormal)
        last = 2.0 ** (math.frexp(float(info.max))[1] - 1) * eps  # spacing of the largest numbers
        ties += [1 + eps / 2, 1 + 3 * eps / 2, 2 - eps / 2, float(info.max) + last / 2]
        ties += [tiny / 2, 3 * tiny / 2]
    return ties


def _not_finite(dtype: np.dtype) -> np.ndarray:
    """Return infinities and NaN by their bits; a format may lack infinities."""
    width = 8 * dtype.itemsize
    unsigned = np.dtype(f"u{dtype.itemsize}")
    digits = ml_dtypes.finfo(dtype).nmant
    exponent = ((1 << (width - 1)) - 1) >> digits << digits
    payloads = [0, 1, 1 << (digits - 1), (1 << digits) - 1, (1 << digits) - 2]
    patterns = [sign | exponent | p for p in payloads for sign in (0, 1 << (width - 1))]
    patterns.append(1 << (width - 1))  # the NaN of formats without a negative zero
    found = np.array(list(dict.fromkeys(patterns)), unsigned).view(dtype)
    return found[~np.isfinite(found)]


def _packed(values: Sequence[Any], dtype: np.dtype) -> np.ndarray:
    """Return an array with the bits of each value, NaN payloads included."""
    return np.frombuffer(b"".join(np.asarray(v, dtype).tobytes() for v in values), dtype).copy()
