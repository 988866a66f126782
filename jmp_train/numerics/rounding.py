"""Rounding of float32 to narrower formats: stochastic, to nearest, split, compensated.

All functions compute on bit patterns, for two reasons. XLA may remove a conversion from float32 to
bfloat16 and back inside a compiled program (`xla_allow_excess_precision`), which would undo a
rounding. Some devices flush subnormal operands. Neither affects integers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmp_train.numerics.dtypes import is_floating
from jmp_train.types import DTypeLike, PyTree

#: The formats that this module rounds to.
NARROW_FORMATS: tuple[np.dtype, ...] = tuple(
    np.dtype(getattr(jnp, name)) for name in ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
)
_BFLOAT16 = np.dtype(jnp.bfloat16)


def stochastic_round(x: Any, dtype: DTypeLike, key: Any) -> jax.Array:
    """Round float32 to one of its two neighbours in a narrower format, without bias.

    A value between the neighbours `below` and `above` is rounded to `above` with probability
    `(x - below) / (above - below)`, so the mean of the result is `x`. For bfloat16 the probability
    is exact for every float32. For other formats it is exact if abs(x) is at least 2^-40 of the
    format's smallest subnormal; for smaller x it is too small by less than 2^-64.

    A value that the format represents is returned unchanged, including the sign of zero. A value
    that is rounded to zero keeps its sign. Subnormal results are treated like normal ones. Beyond
    the largest finite value there is no neighbour above, and the result is that of a cast: the
    largest value up to half of a spacing beyond it, then infinity (NaN in float8_e4m3fn, which has
    no infinity). Infinities and NaN are cast too.

    Args:
      x: float32 or narrower; any shape.
      dtype: bfloat16, float16, float8_e4m3fn or float8_e5m2.
      key: PRNG key, typed or raw. Each element draws 16 (bfloat16) or 64 random bits.

    Returns:
      An array of x's shape in `dtype`. Equal keys give equal results.

    Raises:
      TypeError: if x is not floating, or wider than float32.
      ValueError: for another dtype.

    >>> x = jnp.full(10_000, 1.001)  # bfloat16 has 1 and 1.0078125 here
    >>> rounded = stochastic_round(x, jnp.bfloat16, jax.random.key(0)).astype(jnp.float32)
    >>> sorted(set(rounded.tolist())), round(float(rounded.mean()), 3)
    ([1.0, 1.0078125], 1.001)

    Source: Gupta et al. 2015, "Deep Learning with Limited Numerical Precision", section 3; Croci
    et al. 2022, "Stochastic rounding: implementation, error analysis and applications".
    """
    x, dtype = _float32(x), _narrow_format(dtype)
    truncated, dropped, count = _truncate(x, dtype)
    if dtype == _BFLOAT16:  # 16 bits are dropped, always
        up = jax.random.bits(key, x.shape, jnp.uint16) < dropped
    else:
        high, low = _as_fraction(dropped, count)
        random = jax.random.bits(key, (2, *x.shape), jnp.uint32)
        up = (random[0] < high) | ((random[0] == high) & (random[1] < low))
    return _assemble(x, truncated + up, dtype)


def round_to_nearest(x: Any, dtype: DTypeLike) -> jax.Array:
    """Round float32 to the nearest value of a narrower format, ties to even.

    The result is that of `x.astype(dtype)`, subnormals included. It is computed with integers, so a
    compiler cannot undo the rounding when the result is widened again.

    Args:
      x: float32 or narrower; any shape.
      dtype: bfloat16, float16, float8_e4m3fn or float8_e5m2.

    Returns:
      An array of x's shape in `dtype`.

    Raises:
      TypeError: if x is not floating, or wider than float32.
      ValueError: for another dtype.

    >>> round_to_nearest(1.001, jnp.bfloat16)
    Array(1, dtype=bfloat16)
    """
    x, dtype = _float32(x), _narrow_format(dtype)
    truncated, dropped, count = _truncate(x, dtype)
    half = jnp.uint32(1) << (jnp.minimum(count, 31) - 1)
    up = (dropped > half) | ((dropped == half) & (truncated & 1 == 1))
    return _assemble(x, truncated + up, dtype)


def split_bf16_remainder(x: Any) -> tuple[jax.Array, jax.Array]:
    """Split float32 into the nearest bfloat16 and the low 16 bits.

    Ties are rounded away from zero: of two equally near bfloat16 values, the result is the larger
    in magnitude. Ties to even are impossible, because 65,537 float32 values would round to an even
    bfloat16, one more than 16 bits distinguish. With ties away from zero, 65,536 values round to
    each bfloat16, and the highest bit of the remainder shows whether the magnitude was rounded up.
    Carries go into the exponent, and from the largest values into infinity, as in any rounding to
    nearest. NaN gives NaN.

    Args:
      x: float32; any shape.

    Returns:
      `(nearest, remainder)`: bfloat16 and uint16, the low half of the float32, of x's shape.
      `join_bf16_remainder` returns x bit for bit; a signalling NaN becomes quiet.

    Raises:
      TypeError: if x is not float32 or narrower.

    >>> nearest, remainder = split_bf16_remainder(jnp.float32(1.001))
    >>> nearest, remainder, join_bf16_remainder(nearest, remainder)
    (Array(1, dtype=bfloat16), Array(8389, dtype=uint16), Array(1.001, dtype=float32))

    Source: the scheme of NVIDIA Apex's `DistributedFusedAdam(store_param_remainders=True)`.
    """
    bits = jax.lax.bitcast_convert_type(_float32(x), jnp.uint32)
    high, low = bits >> 16, bits & 0xFFFF
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    # A NaN's payload may be in the low half only. The quiet bit makes the high half a NaN too.
    high = jnp.where(is_nan, high | 0x40, high + (low >> 15))
    nearest = jax.lax.bitcast_convert_type(high.astype(jnp.uint16), jnp.bfloat16)
    return nearest, low.astype(jnp.uint16)


def join_bf16_remainder(nearest: Any, remainder: PyTree) -> jax.Array:
    """Join the two results of `split_bf16_remainder` to the float32 value.

    Args:
      nearest: bfloat16; any shape.
      remainder: uint16, of that shape.

    Returns:
      float32, of that shape.

    Raises:
      TypeError: for other dtypes.

    >>> join_bf16_remainder(jnp.bfloat16(1.0), jnp.uint16(0x8000))  # rounded up, by half a spacing
    Array(0.9980469, dtype=float32)
    """
    nearest, remainder = jnp.asarray(nearest), jnp.asarray(remainder)
    if (nearest.dtype, remainder.dtype) != (_BFLOAT16, np.uint16):
        raise TypeError(
            f"got {nearest.dtype} and {remainder.dtype}; expected bfloat16 and uint16, as "
            "split_bf16_remainder gives them"
        )
    high = jax.lax.bitcast_convert_type(nearest, jnp.uint16).astype(jnp.uint32)
    low = remainder.astype(jnp.uint32)
    is_nan = (high & 0x7FFF) > 0x7F80
    high = jnp.where(is_nan, high, high - (low >> 15))
    return jax.lax.bitcast_convert_type((high << 16) | low, jnp.float32)


def kahan_add(value: PyTree, compensation: Any, increment: Any) -> tuple[jax.Array, jax.Array]:
    """Add to a value in a narrow format, and return the rounding error for the next addition.

        total = increment + compensation
        new   = round(value + total)
        compensation = total - (new - value)

    The computation is in float32. If the new value is not finite, the compensation is 0.

    Args:
      value: bfloat16, float16, float8_e4m3fn or float8_e5m2; any shape.
      compensation: error of earlier additions, initially 0; any of these dtypes.
      increment: float32 or narrower, of that shape.

    Returns:
      `(value, compensation)`, each in its original dtype. With a bfloat16 compensation, equal
      increments of more than 2^-10 of the value's spacing always count. Their sum has an error of
      up to 20 % at 2^-16 of a bfloat16 value or 2^-19 of a float16 one, and half as much for each
      doubling. Smaller increments stall once the compensation's spacing is at least twice as wide.

    Raises:
      TypeError: for an increment that is not float32 or narrower.
      ValueError: for a value or a compensation of another dtype.

    >>> value, lost = jnp.bfloat16(1), jnp.bfloat16(0)
    >>> for _ in range(1000):
    ...     value, lost = kahan_add(value, lost, 0.001)  # alone, 1 + 0.001 is 1 in bfloat16
    >>> float(value)
    2.0

    Source: Kahan 1965, "Further remarks on reducing truncation errors"; Zamirai et al. 2020,
    "Revisiting BFloat16 Training", algorithm 3.
    """
    value, compensation = jnp.asarray(value), jnp.asarray(compensation)
    _narrow_format(value.dtype)
    start = to_float32(value)
    total = add_float32(to_float32(compensation), _float32(increment))
    new = round_to_nearest(add_float32(start, total), value.dtype)
    moved = to_float32(new) - start
    lost = jnp.where(jnp.isfinite(moved), add_float32(total, -moved), 0.0)
    return new, round_to_nearest(lost, compensation.dtype)


def add_float32(x: jax.Array, y: jax.Array) -> jax.Array:
    """Add two float32 arrays so that a subnormal x plus zero is x on every device.

    XLA on a CPU treats subnormal operands as zero, so its `x + 0` is 0 for a subnormal x. This
    function returns a subnormal x if the sum is zero, which is the case if y is zero or subnormal.
    All other sums are XLA's: on a CPU, a subnormal next to a normal number counts as zero, and a
    subnormal result of two normal numbers becomes zero. GPUs add subnormals exactly.

    >>> total = add_float32(jnp.float32(2.0**-140), jnp.float32(0))
    >>> int(jax.lax.bitcast_convert_type(total, jnp.uint32)) * 2.0**-149 == 2.0**-140
    True
    """
    return jax.lax.platform_dependent(
        x, y, cuda=jax.lax.add, rocm=jax.lax.add, default=_add_flushed
    )


def to_float32(x: Any) -> jax.Array:
    """Widen to float32 exactly; bfloat16 by its bits, so that a compiler cannot undo its rounding.

    >>> to_float32(jnp.bfloat16(1.001))
    Array(1., dtype=float32)
    """
    x = jnp.asarray(x)
    if x.dtype != _BFLOAT16:
        return x.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(bits << 16, jnp.float32)


def _add_flushed(x: jax.Array, y: jax.Array) -> jax.Array:
    # The test is on the sum and not on y. A second use of y would keep LLVM from fusing a product
    # and this sum into one operation, as it does in float32 training. It would remove `y == 0`.
    total = x + y
    bits, total_bits = (jax.lax.bitcast_convert_type(a, jnp.uint32) for a in (x, total))
    magnitude = bits & 0x7FFFFFFF
    keeps = (magnitude > 0) & (magnitude < 0x00800000) & (total_bits << 1 == 0)
    return jax.lax.bitcast_convert_type(jnp.where(keeps, bits, total_bits), jnp.float32)


def _float32(x: Any) -> jax.Array:
    x = jnp.asarray(x)
    if not is_floating(x.dtype) or jnp.finfo(x.dtype).bits > 32:
        raise TypeError(f"got an array of {x.dtype}; expected float32 or a narrower floating dtype")
    return to_float32(x)


def _narrow_format(dtype: DTypeLike) -> np.dtype:
    dtype = np.dtype(dtype)
    if dtype not in NARROW_FORMATS:
        expected = ", ".join(d.name for d in NARROW_FORMATS)
        raise ValueError(f"cannot round to {dtype}; expected one of {expected}")
    return dtype


def _truncate(x: jax.Array, dtype: np.dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Truncate the magnitude of float32 values to a narrower format.

    Returns:
      The format's bit pattern without sign, the bits that were cut off as an integer, and their
      number, all uint32. The pattern plus one is the next magnitude, with carries into the
      exponent. The results are undefined for infinities, NaN and values beyond the largest finite
      one.
    """
    info = jnp.finfo(dtype)
    magnitude = jax.lax.bitcast_convert_type(x, jnp.uint32) & 0x7FFFFFFF
    if dtype == _BFLOAT16:  # same exponents as float32: a shorter form of the general case
        return magnitude >> 16, magnitude & 0xFFFF, jnp.full_like(magnitude, 16)
    is_normal = magnitude >= 0x00800000
    significand = (magnitude & 0x007FFFFF) | (is_normal.astype(jnp.uint32) << 23)
    exponent = jnp.maximum(magnitude >> 23, 1).astype(jnp.int32) - 127
    # Below the smallest normal exponent, the spacing of the format is constant.
    spaced_as = jnp.maximum(exponent, int(info.minexp))
    count = (23 - info.nmant + spaced_as - exponent).astype(jnp.uint32)
    pattern = ((spaced_as - int(info.minexp)) << info.nmant).astype(jnp.uint32)
    pattern = pattern + (significand >> jnp.minimum(count, 31))
    dropped = significand & ((jnp.uint32(1) << jnp.minimum(count, 24)) - 1)
    return pattern, dropped, count


def _as_fraction(dropped: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return `dropped / 2^count` as a 64-bit binary fraction: high and low 32 bits, uint32."""

    def left(amount: jax.Array) -> jax.Array:  # of 0 to 32 bits; the second shift of 32 gives 0
        return (dropped << (amount // 2)) << (amount - amount // 2)

    def right(amount: jax.Array) -> jax.Array:
        return dropped >> jnp.minimum(amount, 31)

    short = count <= 32
    high = jnp.where(short, left(32 - jnp.minimum(count, 32)), right(jnp.maximum(count, 32) - 32))
    low = jnp.where(
        count <= 64, left(64 - jnp.clip(count, 32, 64)), right(jnp.maximum(count, 64) - 64)
    )
    return high, jnp.where(short, 0, low).astype(jnp.uint32)


def _assemble(x: jax.Array, pattern: jax.Array, dtype: np.dtype) -> jax.Array:
    """Return the pattern with x's sign, or x cast if it is beyond the largest finite value."""
    width = jnp.finfo(dtype).bits
    unsigned = jnp.uint16 if width == 16 else jnp.uint8
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    largest = np.asarray(jnp.finfo(dtype).max, np.float32).view(np.uint32)
    beyond = (bits & 0x7FFFFFFF) > int(largest)
    cast = jax.lax.bitcast_convert_type(x.astype(dtype), unsigned)
    ours = ((bits >> 31) << (width - 1) | pattern).astype(unsigned)
    return jax.lax.bitcast_convert_type(jnp.where(beyond, cast, ours), dtype)
