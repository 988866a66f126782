"""Self-attention and rotary positions; chooses the implementation of attention."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jmp_train._autocast.traced_in_half import traced_in_half
from jmp_train.models.blockwise import blockwise_attention
from jmp_train.types import DTypeLike

LONG = 1024
"""Number of positions from which on causal attention goes by blocks."""
LONG_ENCODER = 128
"""Number of positions from which on attention over all of them goes by blocks."""


class Segments(NamedTuple):
    """Documents that share a row: a token attends to its own, whose positions begin at 0."""

    ids_BxT: jax.Array
    """int32, the same number for neighbouring tokens of one document."""
    positions_BxT: jax.Array
    """int32, positions of the tokens in their documents."""

    @classmethod
    def of(cls, ids_BxT: jax.Array) -> Segments:
        """Return segments from the number of each token's document.

        >>> Segments.of(jnp.array([[1, 1, 2, 2, 2]])).positions_BxT.tolist()
        [[0, 1, 0, 1, 2]]
        """
        place_T = jnp.arange(ids_BxT.shape[1])
        begins_BxT = jnp.diff(ids_BxT, axis=1, prepend=ids_BxT[:, :1]) != 0
        starts_BxT = jax.lax.cummax(jnp.where(begins_BxT, place_T, 0), axis=1)
        return cls(ids_BxT, place_T - starts_BxT)


def rotary(x_BxTxHxK: jax.Array, positions_T: jax.Array, *, theta: float = 10000.0) -> jax.Array:
    """Rotate pairs of features by angles that are proportional to the position.

    The product of a rotated query and a rotated key depends on the distance of their positions only.
    Features i and i + K/2 form a pair, rotated by the angle `position * theta**(-2 i / K)`.

    Args:
      x_BxTxHxK: queries or keys, (batch, positions, heads, features); an even number of features.
      positions_T: int32, (positions,); or (batch, positions), other ones in each row.
      theta: base of the angles; the longest wavelength is about 2 pi times `theta` positions.

    Returns:
      Rotated features of the same shape and dtype; angles and products are float32.

    Source: Su et al. 2021, "RoFormer", arXiv:2104.09864, equation 34.

    >>> x = rotary(jnp.ones((1, 2, 1, 2)), jnp.array([0, 1]))
    >>> [round(float(y), 3) for y in x[0, 1, 0]]  # cos 1 - sin 1, sin 1 + cos 1
    [-0.301, 1.382]
    """
    half = x_BxTxHxK.shape[-1] // 2
    frequencies = theta ** (-np.arange(half) / half)
    angles_TxF = positions_T[..., None] * jnp.asarray(frequencies, jnp.float32)
    cos, sin = (f(angles_TxF)[..., None, :] for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x_BxTxHxK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return rotated.astype(x_BxTxHxK.dtype)


@traced_in_half
def causal_attention(
    q_BxTxHxK: jax.Array,
    k_BxTxHxK: jax.Array,
    v_BxTxHxK: jax.Array,
    segments: Segments | None = None,
) -> jax.Array:
    """Compute attention of each position over itself and earlier positions; softmax in float32.

    On NVIDIA GPUs since Ampere, half precision uses cuDNN's fused kernel, which does not store the
    scores of all pairs. Otherwise, and with segments, which the fused kernel takes only as a bias for
    all pairs, rows of `LONG` positions or more go by blocks (`blockwise_attention`), and XLA computes
    the scores of shorter ones at once.

    Args:
      q_BxTxHxK: queries, (batch, positions, heads, features).
      k_BxTxHxK: keys, of the same shape and dtype.
      v_BxTxHxK: values, of the same shape and dtype.
      segments: documents in each row, which do not attend to each other; None: one.

    Returns:
      Weighted means of the values, of the same shape and dtype.

    >>> values = jnp.array([1.0, 3.0]).reshape(1, 2, 1, 1)
    >>> zeros = jnp.zeros_like(values)  # equal scores
    >>> causal_attention(zeros, zeros, values).ravel().tolist()
    [1.0, 2.0]
    """
    implementation = _implementation(q_BxTxHxK.dtype, q_BxTxHxK.shape[-1])
    fused = implementation == "cudnn" and segments is None
    if not fused and q_BxTxHxK.shape[1] >= LONG:
        ids_BxT = None if segments is None else segments.ids_BxT
        return blockwise_attention(q_BxTxHxK, k_BxTxHxK, v_BxTxHxK, ids_BxT)
    if segments is not None:
        ids_BxT, position = segments.ids_BxT, jnp.arange(q_BxTxHxK.shape[1])
        same_BxTxT = ids_BxT[:, :, None] == ids_BxT[:, None, :]
        mask_Bx1xTxT = (same_BxTxT & (position[:, None] >= position[None, :]))[:, None]
        if implementation == "plain":
            return masked_attention(q_BxTxHxK, k_BxTxHxK, v_BxTxHxK, mask_Bx1xTxT)
        return jax.nn.dot_product_attention(
            q_BxTxHxK, k_BxTxHxK, v_BxTxHxK, mask=mask_Bx1xTxT, implementation="xla"
        )
    if implementation != "plain":
        return jax.nn.dot_product_attention(
            q_BxTxHxK,
            k_BxTxHxK,
            v_BxTxHxK,
            is_causal=True,
            implementation=implementation,
        )
    position = jnp.arange(q_BxTxHxK.shape[1])
    return masked_attention(q_BxTxHxK, k_BxTxHxK, v_BxTxHxK, position[:, None] >= position[None, :])


def encoder_attention(
    q_BxTxHxK: jax.Array, k_BxTxHxK: jax.Array, v_BxTxHxK: jax.Array
) -> jax.Array:
    """Compute attention of each position over all positions; softmax in float32.

    From `LONG_ENCODER` positions on it goes by blocks (`blockwise_attention`), so that no scores are
    kept for the backward pass; forward mode is not available there.

    Args:
      q_BxTxHxK: queries, (batch, positions, heads, features).
      k_BxTxHxK: keys, of the same shape and dtype.
      v_BxTxHxK: values, of the same shape and dtype.

    Returns:
      Weighted means of the values, of the same shape and dtype.

    >>> values = jnp.array([1.0, 3.0]).reshape(1, 2, 1, 1)
    >>> zeros = jnp.zeros_like(values)  # equal scores
    >>> encoder_attention(zeros, zeros, values).ravel().tolist()
    [2.0, 2.0]
    """
    if q_BxTxHxK.shape[1] >= LONG_ENCODER:
        return blockwise_attention(q_BxTxHxK, k_BxTxHxK, v_BxTxHxK, causal=False)
    if _implementation(q_BxTxHxK.dtype, q_BxTxHxK.shape[-1]) is None:
        return jax.nn.dot_product_attention(q_BxTxHxK, k_BxTxHxK, v_BxTxHxK)
    return masked_attention(q_BxTxHxK, k_BxTxHxK, v_BxTxHxK, None)


def masked_attention(
    q_BxTxHxK: jax.Array, k_BxSxHxK: jax.Array, v_BxSxHxK: jax.Array, mask_TxS: jax.Array | None
) -> jax.Array:
    """Compute attention over unmasked keys: products in the inputs' dtype, softmax in float32.

    Args:
      q_BxTxHxK: queries, (batch, positions, heads, features).
      k_BxSxHxK: keys, (batch, keys, heads, features).
      v_BxSxHxK: values, of the same shape as the keys.
      mask_TxS: bool, (positions, keys), or (batch, 1, positions, keys); True where a query attends to
        a key. Each query needs at least one key. None: to all.

    Returns:
      Weighted means of the values, of the shape and dtype of the queries.

    >>> values = jnp.array([1.0, 3.0]).reshape(1, 2, 1, 1)
    >>> zeros = jnp.zeros_like(values)  # equal scores
    >>> masked_attention(zeros, zeros, values, jnp.array([[False, True], [True, True]])).ravel()
    Array([3., 2.], dtype=float32)
    """
    # Queries are scaled before the product, because unscaled float16 scores overflow sooner.
    q_BxTxHxK = q_BxTxHxK * np.asarray(q_BxTxHxK.shape[-1] ** -0.5, q_BxTxHxK.dtype)
    scores_BxHxTxS = jnp.einsum("bthk,bshk->bhts", q_BxTxHxK, k_BxSxHxK).astype(jnp.float32)
    if mask_TxS is not None:
        scores_BxHxTxS = jnp.where(mask_TxS, scores_BxHxTxS, -jnp.inf)
    weights_BxHxTxS = jax.nn.softmax(scores_BxHxTxS).astype(v_BxSxHxK.dtype)
    return jnp.einsum("bhts,bshk->bthk", weights_BxHxTxS, v_BxSxHxK)


def _implementation(dtype: DTypeLike, features: int) -> Literal["cudnn", "plain"] | None:
    """Choose attention where the program will run: cuDNN's, JAX's (None) or `masked_attention`."""
    backend, half = _platform.get() or jax.default_backend(), dtype in (jnp.float16, jnp.bfloat16)
    if backend == "gpu" and half and features % 8 == 0 and features <= 128 and _fused_attention():
        return "cudnn"
    if half and (backend != "cpu" or dtype == jnp.float16):
        # JAX's has float32 products in the backward pass. On a CPU, in float16, it raises.
        return "plain"
    return None


_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


@contextlib.contextmanager
def compiled_for(platform: str) -> Iterator[None]:
    """Choose attention for another platform than the default device's: "cpu", "gpu" or "tpu".

    A fused kernel is not chosen for a GPU that is not here.

    >>> with compiled_for("tpu"):
    ...     q = jnp.ones((1, 2, 1, 8), jnp.bfloat16)
    ...     "float32[1,2" in str(jax.make_jaxpr(causal_attention)(q, q, q))
    False
    """
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)


def _fused_attention() -> bool:
    """Return whether the GPU has cuDNN's fused attention: NVIDIA, compute capability 8.0 or more."""
    if jax.default_backend() != "gpu":
        return False
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    return capability.replace(".", "").isdigit() and float(capability) >= 8.0
