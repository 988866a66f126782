"""Digests of arrays, computed on their device, to notice damage on the disk."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import jax
import jax.numpy as jnp

from jmp_train.types import PyTree

_STARTS = (0x243F6A88, 0x85A308D3)  # of the two sums: the first digits of pi after the point
_MIX = ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1))  # MurmurHash3's 32-bit finaliser


def array_digests(tree: PyTree) -> dict[str, str]:
    """Return a digest of each array of a pytree, by its path.

    The words of an array, each mixed with its position by MurmurHash3's finaliser, are summed modulo
    2^32, twice with other starts. Integer sums do not depend on their order, so the digest is the
    same on every device and under every sharding, and the arrays need not come to the host. The
    finaliser is one to one, so a change within any one word always shows; other damage goes unseen
    with a chance of about 2^-64. The digest does not protect against forgery.

    Args:
      tree: arrays of any dtype, PRNG keys too.

    Returns:
      16 hexadecimal digits each, by path.

    >>> import numpy as np
    >>> x = np.zeros(5, np.float32)
    >>> x[3] = -0.0
    >>> array_digests({"x": x}) == array_digests({"x": np.zeros(5, np.float32)})
    False
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = jax.device_get(_sums([leaf for _, leaf in leaves]))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{a:08x}{b:08x}"
        for (path, _), (a, b) in zip(leaves, sums, strict=True)
    }


@jax.jit
def _sums(leaves: list[Any]) -> list[jax.Array]:
    return [_sum(_words(leaf)) for leaf in leaves]


def _words(x: Any) -> jax.Array:
    """Return the bits of an array as uint32, in its shape, so that what is split stays so; for wider
    numbers, with an axis of words at the end."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    x = jnp.asarray(x)
    if x.dtype == jnp.bool_ or jnp.dtype(x.dtype).name in ("int4", "uint4", "int2", "uint2"):
        return x.astype(jnp.uint32)  # one to one
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    width = x.dtype.itemsize * 8
    unsigned = jnp.uint32 if width > 32 else jnp.dtype(f"uint{width}")
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _sum(words: jax.Array) -> jax.Array:
    place = jnp.zeros((), jnp.uint32)
    for axis in range(words.ndim):
        stride = math.prod(words.shape[axis + 1 :]) % 2**32
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place = place + index * jnp.uint32(stride)
    sums = []
    for start in _STARTS:
        x = words ^ (place * jnp.uint32(0x9E3779B9) + jnp.uint32(start))
        for shift, multiplier in _MIX:
            x = (x ^ (x >> shift)) * jnp.uint32(multiplier)
        sums.append(jnp.sum(x, dtype=jnp.uint32))
    return jnp.stack(sums)


def json_digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value; the order of keys does not matter.

    >>> json_digest({"a": 1, "b": 2}) == json_digest({"b": 2, "a": 1})
    True
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
