"""Attention by blocks, whose memory grows with the length and not with its square."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmp_train.numerics.dtypes import at_least_float32

BLOCK = 256
"""Largest number of queries, and of keys, whose scores are in memory at once."""


def blockwise_attention(
    q_BxTxHxK: jax.Array,
    k_BxTxHxK: jax.Array,
    v_BxTxHxK: jax.Array,
    ids_BxT: jax.Array | None = None,
    block: int | None = None,
    *,
    causal: bool = True,
) -> jax.Array:
    """Compute attention of each position over others, a pair of blocks at a time.

    Products have operands in the dtype of the arguments; scores, softmax and sums are float32. The
    backward pass computes the scores again. It is a custom rule, so forward mode is not available.

    Args:
      q_BxTxHxK: queries, (batch, positions, heads, features).
      k_BxTxHxK: keys, of the same shape and dtype.
      v_BxTxHxK: values, of the same shape and dtype.
      ids_BxT: int32, above the smallest one, the number of the document of each position, which attends
        to its own alone; None: one document.
      block: largest number of positions in a block; None: `BLOCK`, or of a causal row an eighth, but
        at least 128.
      causal: whether a position attends to itself and earlier ones alone.

    Returns:
      Weighted means of the values, of the same shape and dtype.

    >>> values = jnp.array([1.0, 3.0]).reshape(1, 2, 1, 1)
    >>> zeros = jnp.zeros_like(values)  # equal scores
    >>> blockwise_attention(zeros, zeros, values).ravel().tolist()
    [1.0, 2.0]

    Source: Dao et al. 2022, "FlashAttention", arXiv:2205.14135, algorithms 1 and 4.
    """
    length = q_BxTxHxK.shape[1]
    if block is None:
        block = min(max(length // 8, 128), BLOCK) if causal else BLOCK
    blocks = max(-(-length // max(block, 1)), 1)
    block = max(-(-length // blocks), 1)
    padding = blocks * block - length
    if ids_BxT is None:
        ids_BxT = jnp.zeros(q_BxTxHxK.shape[:2], jnp.int32)
    padded = lambda x: jnp.pad(x, [(0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)])
    # No query attends to the padding: its keys come after all, or are those of another document.
    ids_BxT = jnp.pad(ids_BxT, [(0, 0), (0, padding)], constant_values=np.iinfo(np.int32).min)
    out: Any = _attention(*map(padded, (q_BxTxHxK, k_BxTxHxK, v_BxTxHxK)), ids_BxT, block, causal)
    return out[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(
    q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array, block: int, causal: bool
) -> jax.Array:
    return _forward(q, k, v, ids, block, causal)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array, block: int, causal: bool
) -> Any:
    batch, length, heads, _ = q.shape
    wide = at_least_float32(q.dtype)

    def add(carry: Any, pair: jax.Array) -> Any:
        sums_BxTxHxK, total_BxHxT, largest_BxHxT = carry
        i, j = pair[0] * block, pair[1] * block
        q_BxQxHxK, k_BxSxHxK, v_BxSxHxK = _part(q, i, block), _part(k, j, block), _part(v, j, block)
        scores_BxHxQxS = _scores(q_BxQxHxK, k_BxSxHxK, ids, i, j, block, causal)
        before_BxHxQ = _part(largest_BxHxT, i, block, axis=2)
        now_BxHxQ = jnp.maximum(before_BxHxQ, scores_BxHxQxS.max(-1))
        shrink_BxHxQ = jnp.exp(before_BxHxQ - now_BxHxQ)
        weights_BxHxQxS = jnp.exp(scores_BxHxQxS - now_BxHxQ[..., None])
        total_BxHxQ = _part(total_BxHxT, i, block, axis=2) * shrink_BxHxQ + weights_BxHxQxS.sum(-1)
        sums_BxQxHxK = _part(sums_BxTxHxK, i, block) * jnp.moveaxis(shrink_BxHxQ, 1, 2)[..., None]
        sums_BxQxHxK += _product("bhqs,bshk->bqhk", weights_BxHxQxS.astype(q.dtype), v_BxSxHxK)
        return (
            _put(sums_BxTxHxK, sums_BxQxHxK, i),
            _put(total_BxHxT, total_BxHxQ, i, axis=2),
            _put(largest_BxHxT, now_BxHxQ, i, axis=2),
        ), None

    zeros = jnp.zeros((batch, heads, length), wide)
    # Each query attends to itself in the first of its pairs, the one on the diagonal.
    start = (jnp.zeros(q.shape, wide), zeros, jnp.full_like(zeros, -jnp.inf))
    pairs = jnp.asarray(_pairs(length // block, causal))
    (sums, total, largest), _ = jax.lax.scan(add, start, pairs)
    out = (sums / jnp.moveaxis(total, 1, 2)[..., None]).astype(q.dtype)
    return out, (q, k, v, ids, out, largest + jnp.log(total))


def _backward(block: int, causal: bool, residuals: Any, g: jax.Array) -> Any:
    q, k, v, ids, out, normaliser_BxHxT = residuals
    wide = at_least_float32(q.dtype)
    scale = q.shape[-1] ** -0.5
    mean_BxHxT = jnp.moveaxis(jnp.sum(g.astype(wide) * out.astype(wide), axis=-1), 1, 2)

    def add(carry: Any, pair: jax.Array) -> Any:
        dq, dk, dv, *sums = carry
        i, j = pair[0] * block, pair[1] * block
        q_BxQxHxK, k_BxSxHxK, v_BxSxHxK = _part(q, i, block), _part(k, j, block), _part(v, j, block)
        g_BxQxHxK = _part(g, i, block)
        scores_BxHxQxS = _scores(q_BxQxHxK, k_BxSxHxK, ids, i, j, block, causal)
        weights_BxHxQxS = jnp.exp(
            scores_BxHxQxS - _part(normaliser_BxHxT, i, block, axis=2)[..., None]
        )
        slopes_BxHxQxS = _product("bqhk,bshk->bhqs", g_BxQxHxK, v_BxSxHxK)
        slopes_BxHxQxS -= _part(mean_BxHxT, i, block, axis=2)[..., None]
        slopes_BxHxQxS = (weights_BxHxQxS * slopes_BxHxQxS * scale).astype(q.dtype)
        weights_BxHxQxS = weights_BxHxQxS.astype(q.dtype)
        dq_i = _part(dq, i, block) + _product("bhqs,bshk->bqhk", slopes_BxHxQxS, k_BxSxHxK)
        # A block of keys begins with its own queries. Its sums alone are wide, and the last one stays.
        dk_j, dv_j = (jnp.where(i == j, 0, x) for x in sums)
        dk_j += _product("bhqs,bqhk->bshk", slopes_BxHxQxS, q_BxQxHxK)
        dv_j += _product("bhqs,bqhk->bshk", weights_BxHxQxS, g_BxQxHxK)
        dk, dv = (_put(x, y.astype(x.dtype), j) for x, y in ((dk, dk_j), (dv, dv_j)))
        return (_put(dq, dq_i, i), dk, dv, dk_j, dv_j), None

    part = jnp.zeros((q.shape[0], block, *q.shape[2:]), wide)
    start = (jnp.zeros(q.shape, wide), jnp.zeros_like(k), jnp.zeros_like(v), part, part)
    pairs = _pairs(q.shape[1] // block, causal)
    by_keys = pairs[np.lexsort((pairs[:, 0], pairs[:, 0] != pairs[:, 1], pairs[:, 1]))]
    (dq, dk, dv, *_), _ = jax.lax.scan(add, start, jnp.asarray(by_keys))
    return dq.astype(q.dtype), dk, dv, np.zeros(ids.shape, jax.dtypes.float0)


_attention.defvjp(_forward, _backward)


def _pairs(count: int, causal: bool) -> np.ndarray:
    """Return the pairs of a block of queries and one of keys; of each queries, the own keys first.

    If `causal`, without the keys that are after the queries.
    """
    later = [] if causal else [(i, j) for i in range(count) for j in range(i + 1, count)]
    pairs = [(i, j) for i in range(count) for j in range(i, -1, -1)]
    return np.array(sorted([*pairs, *later], key=lambda p: (p[0], p[0] != p[1], -p[1])), np.int32)


def _scores(
    q_BxQxHxK: jax.Array,
    k_BxSxHxK: jax.Array,
    ids: jax.Array,
    i: Any,
    j: Any,
    block: int,
    causal: bool,
) -> jax.Array:
    """Return the scaled scores of a pair of blocks, -inf where a query does not attend."""
    # Else the masks of all pairs would be known before the loop, and `jax.checkpoint` would keep them.
    # And one block's scores would be computed once for both passes, and kept in between.
    i, j, q_BxQxHxK, k_BxSxHxK = jax.lax.optimization_barrier((i, j, q_BxQxHxK, k_BxSxHxK))
    # Queries are scaled before the product, because unscaled float16 scores overflow sooner.
    q_BxQxHxK = q_BxQxHxK * np.asarray(q_BxQxHxK.shape[-1] ** -0.5, q_BxQxHxK.dtype)
    scores_BxHxQxS = _product("bqhk,bshk->bhqs", q_BxQxHxK, k_BxSxHxK)
    same_BxQxS = _part(ids, i, block)[:, :, None] == _part(ids, j, block)[:, None, :]
    if causal:
        place = jnp.arange(block)
        same_BxQxS &= (i + place)[:, None] >= (j + place)[None, :]
    # Not -inf: a block without a key of a query's document would give it a NaN.
    return jnp.where(same_BxQxS[:, None], scores_BxHxQxS, -1e30)


def _product(dimensions: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(dimensions, a, b, preferred_element_type=at_least_float32(a.dtype))


def _part(x: jax.Array, start: Any, block: int, axis: int = 1) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, block, axis)


def _put(x: jax.Array, part: jax.Array, start: Any, axis: int = 1) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part, start, axis)
