"""Causal self-attention and rotary positions; the one place that chooses how attention is computed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def rotary(x_BxTxHxK: jax.Array, positions_T: jax.Array, *, theta: float = 10000.0) -> jax.Array:
    """Turns pairs of features by angles that grow with the position.

    The product of a turned query and a turned key depends on their distance alone, not on where
    they stand. Feature i and feature i + K/2 make a pair, turned by `position * theta**(-2 i / K)`.

    Args:
      x_BxTxHxK: queries or keys, (batch, positions, heads, features), features even.
      positions_T: int32, (positions,).
      theta: the longest wavelength is about 2 pi times this.

    Returns:
      The same shape and dtype; angles and products are float32.

    Source: Su et al. 2021, "RoFormer", arXiv:2104.09864, equation 34.

    >>> x = rotary(jnp.ones((1, 2, 1, 2)), jnp.array([0, 1]))
    >>> [round(float(y), 3) for y in x[0, 1, 0]]  # cos 1 - sin 1, sin 1 + cos 1
    [-0.301, 1.382]
    """
    half = x_BxTxHxK.shape[-1] // 2
    frequencies = theta ** (-np.arange(half) / half)
    angles_TxF = positions_T[:, None] * jnp.asarray(frequencies, jnp.float32)
    cos, sin = (f(angles_TxF)[:, None, :] for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x_BxTxHxK.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return turned.astype(x_BxTxHxK.dtype)


def causal_attention(q_BxTxHxK: jax.Array, k_BxTxHxK: jax.Array, v_BxTxHxK: jax.Array) -> jax.Array:
    """Attention of every position over itself and those before it; softmax in float32.

    On an NVIDIA GPU since Ampere, half precision runs in cuDNN's fused kernel, which never holds
    the scores of all pairs; elsewhere XLA computes it.

    Args:
      q_BxTxHxK: queries, (batch, positions, heads, features).
      k_BxTxHxK: keys, of the same shape and dtype.
      v_BxTxHxK: values, of the same shape and dtype.

    Returns:
      The same shape and dtype.
    """
    way = _implementation(q_BxTxHxK.dtype, q_BxTxHxK.shape[-1])
    if way != "plain":
        return jax.nn.dot_product_attention(
            q_BxTxHxK, k_BxTxHxK, v_BxTxHxK, is_causal=True, implementation=way
        )
    position = jnp.arange(q_BxTxHxK.shape[1])
    return masked_attention(q_BxTxHxK, k_BxTxHxK, v_BxTxHxK, position[:, None] >= position[None, :])


def masked_attention(
    q_BxTxHxK: jax.Array, k_BxSxHxK: jax.Array, v_BxSxHxK: jax.Array, mask_TxS: jax.Array
) -> jax.Array:
    """Attention over the keys that a mask shows: products in the inputs' dtype, softmax in float32.

    Args:
      q_BxTxHxK: queries.
      k_BxSxHxK: keys.
      v_BxSxHxK: values.
      mask_TxS: bool, true where a query sees a key; at least one key for each query.

    Returns:
      Shape and dtype of the queries.
    """
    # Scaled before the product: float16 scores of unscaled queries overflow sooner.
    q_BxTxHxK = q_BxTxHxK * np.asarray(q_BxTxHxK.shape[-1] ** -0.5, q_BxTxHxK.dtype)
    scores_BxHxTxS = jnp.einsum("bthk,bshk->bhts", q_BxTxHxK, k_BxSxHxK).astype(jnp.float32)
    scores_BxHxTxS = jnp.where(mask_TxS, scores_BxHxTxS, -jnp.inf)
    weights_BxHxTxS = jax.nn.softmax(scores_BxHxTxS).astype(v_BxSxHxK.dtype)
    return jnp.einsum("bhts,bshk->bthk", weights_BxHxTxS, v_BxSxHxK)


def _implementation(dtype: Any, features: int) -> Any:
    """Which attention fits a dtype on the default device: "cudnn", None (XLA's choice) or "plain"."""
    backend, half = jax.default_backend(), dtype in (jnp.float16, jnp.bfloat16)
    if backend == "cpu" and dtype == jnp.float16:
        return "plain"  # JAX's asks for a float16 product that no CPU has, and raises
    if backend == "gpu" and half and features % 8 == 0 and features <= 128 and _fused_attention():
        return "cudnn"
    return None


def _fused_attention() -> bool:
    """Whether the GPU is one for cuDNN's fused attention: NVIDIA, compute capability 8.0 or more."""
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    return capability.replace(".", "").isdigit() and float(capability) >= 8.0
