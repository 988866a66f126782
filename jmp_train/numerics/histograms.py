"""What numbers do in a format: exponents counted, and the share that a format would lose.

All of it works on the bits of float32, into which every narrower format embeds exactly, so nothing
depends on how a device treats subnormal numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jmp_train.numerics.dtypes import parse_dtype

#: Exponents of float32's numbers: -149 (its smallest subnormal) to 127.
EXPONENTS = range(-149, 128)


class ExponentHistogram(NamedTuple):
    """How many numbers have which exponent, floor(log2 |x|)."""

    counts: jax.Array  # shape=(277,), uint32: counts[i] numbers have the exponent EXPONENTS[i]
    zero: jax.Array  # shape=(), uint32
    inf: jax.Array  # shape=(), uint32
    nan: jax.Array  # shape=(), uint32


class FormatShares(NamedTuple):
    """What rounding to a format would make of numbers; shares of all of them, float32."""

    zero: jax.Array  # zero already
    flushed: jax.Array  # rounded to zero
    subnormal: jax.Array  # rounded to a subnormal number, which keeps fewer digits
    normal: jax.Array
    overflow: jax.Array  # finite, and too large for the format
    inf: jax.Array  # infinite already
    nan: jax.Array


def exponent_histogram(tree: Any) -> ExponentHistogram:
    """Counts the exponents of all floating numbers of a pytree.

    A subnormal number counts under its value's exponent, -149 for float32's smallest. Jittable.

    Args:
      tree: a pytree; its floating leaves are counted, at most 4,294,967,295 numbers. float64 is
        rounded to float32 first.

    >>> histogram = exponent_histogram({"w": jnp.array([1.0, 1.5, -0.25, 0.0, jnp.inf])})
    >>> {e: int(n) for e, n in zip(EXPONENTS, histogram.counts) if n}, int(histogram.zero)
    ({-2: 1, 0: 2}, 1)
    """
    bins = jnp.zeros(len(EXPONENTS) + 3, jnp.uint32)
    for bits in _magnitudes(tree):
        exponent = (bits >> 23).astype(jnp.int32)  # biased by 127
        # Below the smallest normal number the highest set bit tells.
        subnormal = 31 - jax.lax.clz(bits).astype(jnp.int32)
        index = jnp.where(exponent > 0, exponent + 22, subnormal)
        special = jnp.where(bits == _INF, 1, 2)
        index = jnp.where(bits >= _INF, len(EXPONENTS) + special, index)
        index = jnp.where(bits == 0, len(EXPONENTS), index)
        bins = bins.at[index].add(1)
    return ExponentHistogram(bins[: len(EXPONENTS)], *bins[len(EXPONENTS) :])


def shares_in(tree: Any, dtype: Any, *, scale: Any = 1.0) -> FormatShares:
    """The shares of a pytree's numbers that a format keeps and loses, rounding to nearest even.

    With `scale`, of the numbers times that factor: what a loss scale does to gradients
    (Micikevicius et al. 2018, "Mixed Precision Training", figure 3). Jittable, exact at the ties.

    Args:
      tree: a pytree; its floating leaves count, as in `exponent_histogram`.
      dtype: the format, a name or a dtype, no wider than float32.
      scale: what they are multiplied by, in float32.

    Raises:
      ValueError: for an unknown format, or float64.

    >>> gradients = jnp.array([1e-3, 1e-6, 1e-9, 0.0])
    >>> shares = shares_in(gradients, "float16")
    >>> float(shares.normal), float(shares.subnormal), float(shares.flushed)
    (0.25, 0.25, 0.25)
    >>> float(shares_in(gradients, "float16", scale=65536.0).normal)
    0.75
    """
    edges = _edges(parse_dtype(dtype))
    names = FormatShares._fields
    counts, total = jnp.zeros(len(names), jnp.uint32), 0
    for bits in _magnitudes(tree, scale):
        at = jnp.searchsorted(jnp.asarray(edges), bits.ravel(), side="right", method="compare_all")
        counts += jnp.stack([(at == n).sum(dtype=jnp.uint32) for n in range(len(names))])
        total += bits.size
    return FormatShares(*(counts.astype(jnp.float32) / np.float32(max(total, 1))))


_INF = np.uint32(0x7F800000)


def _magnitudes(tree: Any, scale: Any = None) -> list[jax.Array]:
    """The bits of |x| in float32 for each floating leaf, flat; they order as the numbers do."""
    found = []
    for x in jax.tree.leaves(tree):
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            continue
        bits = _float32_bits(x.ravel())
        if scale is not None:
            wide = jax.lax.bitcast_convert_type(bits, jnp.float32) * jnp.asarray(scale, jnp.float32)
            bits = jnp.where(jnp.asarray(scale) == 1, bits, _float32_bits(wide))
        found.append(bits & np.uint32(0x7FFFFFFF))
    return found


def _float32_bits(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bfloat16:  # a conversion would flush its subnormal numbers on some devices
        return jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16
    return jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)


def _edges(dtype: np.dtype) -> np.ndarray:
    """The float32 bits from which on a magnitude is flushed, subnormal, normal, overflow, inf, NaN.

    Between two numbers of the format the middle goes to the even one.
    """
    if dtype.itemsize > 4:
        raise ValueError(f"shares in {dtype.name}; expected a format no wider than float32")
    info = jnp.finfo(dtype)
    tiny, step = float(info.smallest_normal), float(info.smallest_subnormal)
    largest = np.array(info.max, dtype)
    last_step = float(largest) - float(np.nextafter(largest, np.array(0, dtype)))
    odd = int(largest.view(f"u{dtype.itemsize}")) & 1
    if dtype == np.float32:
        first, normal, overflow = 1, np.float32(tiny).view(np.uint32), _INF
    else:
        bits = lambda value: int(np.float32(value).view(np.uint32))
        first = bits(step / 2) + 1  # the middle between zero and the first goes to zero
        normal = bits(tiny - step / 2)
        overflow = bits(float(largest) + last_step / 2) + (0 if odd else 1)
    return np.array([1, first, normal, overflow, _INF, _INF + 1], np.uint32)
