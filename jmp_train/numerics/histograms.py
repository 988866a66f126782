"""Histograms of exponents, and the shares of numbers that a format represents or loses.

All functions use the bits of float32, which represents every narrower format exactly. The results
therefore do not depend on how a device treats subnormal numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jmp_train.numerics.dtypes import parse_dtype
from jmp_train.types import DTypeLike, PyTree

#: Exponents of float32 numbers: -149 (the smallest subnormal) to 127.
EXPONENTS = range(-149, 128)


class ExponentHistogram(NamedTuple):
    """Number of values with each exponent, floor(log2 |x|)."""

    counts: jax.Array  # shape=(277,), uint32: counts[i] values have the exponent EXPONENTS[i]
    zero: jax.Array  # shape=(), uint32
    inf: jax.Array  # shape=(), uint32
    nan: jax.Array  # shape=(), uint32


class FormatShares(NamedTuple):
    """Shares of numbers by their class after rounding to a format; float32, the sum is 1."""

    zero: jax.Array  # shape=(): zero before rounding
    flushed: jax.Array  # shape=(): rounded to zero
    subnormal: jax.Array  # shape=(): rounded to a subnormal number, which has fewer digits
    normal: jax.Array  # shape=(): rounded to a normal number
    overflow: jax.Array  # shape=(): finite before rounding, and too large for the format
    inf: jax.Array  # shape=(): infinite before rounding
    nan: jax.Array  # shape=()


def exponent_histogram(tree: PyTree) -> ExponentHistogram:
    """Count the exponents of all floating numbers of a pytree. Can be jitted.

    A subnormal number has the exponent of its value, -149 for the smallest float32.

    Args:
      tree: pytree with at most 4,294,967,295 floating numbers. float64 is rounded to float32 first.

    >>> histogram = exponent_histogram({"w": jnp.array([1.0, 1.5, -0.25, 0.0, jnp.inf])})
    >>> {e: int(n) for e, n in zip(EXPONENTS, histogram.counts) if n}, int(histogram.zero)
    ({-2: 1, 0: 2}, 1)
    """
    bins = jnp.zeros(len(EXPONENTS) + 3, jnp.uint32)
    for bits in _magnitudes(tree):
        exponent = (bits >> 23).astype(jnp.int32)  # biased by 127
        # Below the smallest normal number, the highest set bit gives the exponent.
        subnormal = 31 - jax.lax.clz(bits).astype(jnp.int32)
        index = jnp.where(exponent > 0, exponent + 22, subnormal)
        special = jnp.where(bits == _INF, 1, 2)
        index = jnp.where(bits >= _INF, len(EXPONENTS) + special, index)
        index = jnp.where(bits == 0, len(EXPONENTS), index)
        bins = bins.at[index].add(1)
    return ExponentHistogram(bins[: len(EXPONENTS)], *bins[len(EXPONENTS) :])


def shares_in(tree: PyTree, dtype: DTypeLike, *, scale: Any = 1.0) -> FormatShares:
    """Return the shares of a pytree's numbers that a format represents and loses. Can be jitted.

    Rounding is to nearest even and exact at ties. `scale` shows the effect of a loss scale on
    gradients (Micikevicius et al. 2018, "Mixed Precision Training", figure 3).

    Args:
      tree: pytree whose floating leaves are counted, as in `exponent_histogram`.
      dtype: name or dtype of the format, not wider than float32.
      scale: factor that multiplies the numbers first, in float32.

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


def _magnitudes(tree: PyTree, scale: Any = None) -> list[jax.Array]:
    """Return the float32 bits of |x| for each floating leaf, flat. Their order is that of |x|."""
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
    if x.dtype == jnp.bfloat16:  # some devices flush subnormal numbers in a conversion
        return jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16
    return jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)


def _edges(dtype: np.dtype) -> np.ndarray:
    """Return the first float32 bits of each class: flushed, subnormal, normal, overflow, inf, NaN.

    The middle between two numbers of the format is rounded to the even one.
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
        first = bits(step / 2) + 1  # the middle below the first is rounded to zero
        normal = bits(tiny - step / 2)
        overflow = bits(float(largest) + last_step / 2) + (0 if odd else 1)
    return np.array([1, first, normal, overflow, _INF, _INF + 1], np.uint32)
