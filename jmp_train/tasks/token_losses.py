"""Cross-entropy over a vocabulary, with the logits of a few tokens in memory at a time."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from jmp_train.numerics.dtypes import at_least_float32
from jmp_train.sharding.mesh import AXES, BATCH_AXES
from jmp_train.sharding.sharded import batch_shards
from jmp_train.sharding.tensor import tensor_size, whole_features
from jmp_train.types import PyTree


def token_losses(
    x_NxD: jax.Array, embedding_VxD: jax.Array, targets_N: jax.Array, chunk: int
) -> jax.Array:
    """Return the cross-entropy of each token; the logits are the products of `x` and an embedding.

    Products have operands in the dtype of the arguments; logits, softmax and losses are float32.
    Only the logits of `chunk` tokens are in memory at a time. The backward pass computes the logits
    again, has products in the same dtype, and accumulates the gradient of the embedding in float32.
    It is a custom rule (`jax.custom_vjp`), so forward mode is not available: `jax.jvp` and
    `jax.jacfwd` raise a TypeError.

    Args:
      x_NxD: features of each token.
      embedding_VxD: one row per token of the vocabulary, in the dtype of `x_NxD`.
      targets_N: int32, the correct token at each position.
      chunk: number of tokens at a time.

    Returns:
      Losses in nats, float32 (tokens,).

    >>> x, table = jnp.eye(3), jnp.zeros((4, 3))
    >>> token_losses(x, table, jnp.array([0, 1, 2]), 2).round(4).tolist()  # log 4
    [1.386299967765808, 1.386299967765808, 1.386299967765808]
    """
    # Devices on the axis `tensor` have the same tokens: each computes the logits of its share of them.
    shares = tensor_size() if len(x_NxD) % (batch_shards() * tensor_size()) == 0 else 1
    shards, axes = batch_shards() * shares, AXES if shares > 1 else BATCH_AXES
    x_NxD, targets_N = whole_features(x_NxD), whole_features(targets_N)
    if shards > 1 and len(x_NxD) % shards == 0:
        # The chunks of each device are of its own tokens, and it sums its own gradient of the embedding.
        x_SxNxD, targets_SxN = (
            jax.lax.with_sharding_constraint(y.reshape(shards, -1, *y.shape[1:]), P(axes))
            for y in (x_NxD, targets_N)
        )
        chunk = max(min(chunk, x_SxNxD.shape[1]), 1)
        each = lambda x_NxD, targets_N: _token_losses(x_NxD, embedding_VxD, targets_N, chunk)
        return jax.vmap(each)(x_SxNxD, targets_SxN).reshape(-1)
    # A chunk above the number of tokens would be padded, and the padding computed.
    return _token_losses(x_NxD, embedding_VxD, targets_N, max(min(chunk, len(x_NxD)), 1))


def logits_losses(logits_BxTxV: jax.Array, targets_BxT: jax.Array | np.ndarray) -> jax.Array:
    """Return the cross-entropy of each token, computed in float32 from logits of a network.

    Raises:
      ValueError: if the shapes do not agree.

    >>> logits_losses(jnp.zeros((1, 2, 4)), jnp.array([[0, 3]])).round(4).tolist()  # log 4
    [[1.386299967765808, 1.386299967765808]]
    """
    if logits_BxTxV.ndim != 3 or logits_BxTxV.shape[:2] != targets_BxT.shape:
        raise ValueError(
            f"the network returned shape {logits_BxTxV.shape}; expected logits of shape "
            f"({', '.join(map(str, targets_BxT.shape))}, vocabulary)"
        )
    logits_BxTxV = logits_BxTxV.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits_BxTxV, targets_BxT)


def _forward(
    x_NxD: jax.Array, embedding_VxD: jax.Array, targets_N: jax.Array, chunk: int
) -> PyTree:
    def body(_: None, part: Any) -> PyTree:
        x_CxD, targets_C = part
        logits_CxV = _logits(x_CxD, embedding_VxD)
        total_C = jax.nn.logsumexp(logits_CxV, axis=-1)
        target_C = jnp.take_along_axis(logits_CxV, targets_C[:, None], axis=-1)[:, 0]
        return None, (total_C - target_C, total_C)

    size = len(x_NxD)
    _, out = jax.lax.scan(body, None, _in_chunks((x_NxD, targets_N), chunk))
    losses_N, totals_N = (y.reshape(-1)[:size] for y in out)
    return losses_N, (x_NxD, embedding_VxD, targets_N, totals_N)


def _backward(chunk: int, residuals: Any, grads_N: jax.Array) -> PyTree:
    x_NxD, embedding_VxD, targets_N, totals_N = residuals
    vocabulary, size = len(embedding_VxD), len(x_NxD)

    def body(grad_VxD: jax.Array, part: Any) -> PyTree:
        x_CxD, targets_C, totals_C, grads_C = part
        softmax_CxV = jnp.exp(_logits(x_CxD, embedding_VxD) - totals_C[:, None])
        error_CxV = softmax_CxV - jax.nn.one_hot(targets_C, vocabulary, dtype=softmax_CxV.dtype)
        error_CxV = (error_CxV * grads_C[:, None]).astype(x_CxD.dtype)
        grad_VxD = grad_VxD + _product("cv,cd->vd", error_CxV, x_CxD)
        return grad_VxD, _product("cv,vd->cd", error_CxV, embedding_VxD).astype(x_CxD.dtype)

    zeros = jnp.zeros(embedding_VxD.shape, at_least_float32(embedding_VxD.dtype))
    parts = _in_chunks((x_NxD, targets_N, totals_N, grads_N), chunk)
    grad_VxD, out = jax.lax.scan(body, zeros, parts)
    return out.reshape(-1, x_NxD.shape[1])[:size], grad_VxD.astype(embedding_VxD.dtype), None


_token_losses: Any = jax.custom_vjp(lambda *args: _forward(*args)[0], nondiff_argnums=(3,))
_token_losses.defvjp(_forward, _backward)


def _product(dimensions: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(dimensions, a, b, preferred_element_type=at_least_float32(a.dtype))


def _logits(x_CxD: jax.Array, embedding_VxD: jax.Array) -> jax.Array:
    return _product("cd,vd->cv", x_CxD, embedding_VxD)


def _in_chunks(arrays: PyTree, chunk: int) -> PyTree:
    """Reshape arrays (N, ...) to (chunks, chunk, ...); the padding has a gradient of zero."""

    def split(x: jax.Array) -> jax.Array:
        count = math.ceil(len(x) / chunk)
        x = jnp.pad(x, [(0, count * chunk - len(x)), *[(0, 0)] * (x.ndim - 1)])
        return x.reshape(count, chunk, *x.shape[1:])

    return jax.tree.map(split, arrays)
