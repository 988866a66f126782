"""A decoder-only language model: RMSNorm, rotary positions, SwiGLU, one compiled block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jmp_train.models.attention import Segments, causal_attention, masked_attention, rotary
from jmp_train.models.column_groups import ColumnGroups
from jmp_train.sharding.tensor import whole_features
from jmp_train.types import DTypeLike, Key

TokenLoss = Callable[[jax.Array, jax.Array, jax.Array, int], jax.Array]


class Sizes(NamedTuple):
    """Sizes and rates of a network, which its blocks read."""

    width: int
    depth: int
    heads: int
    inner: int  # width of the gated layer
    dropout: float


class Dtypes(NamedTuple):
    """Dtypes of a layer, with Flax's names as fields."""

    dtype: np.dtype
    param_dtype: np.dtype


class Cache(NamedTuple):
    """Keys and values of the last S positions; position p is stored in slot p modulo S."""

    k_BxSxHxK: jax.Array
    v_BxSxHxK: jax.Array


class Attention(nnx.Module):
    """Causal self-attention with rotary positions, without biases."""

    def __init__(self, config: Sizes, dtypes: Dtypes, *, rngs: nnx.Rngs):
        self.heads = config.heads
        split = ColumnGroups((3, config.heads, config.width // config.heads))
        self.qkv = _linear(config.width, 3 * config.width, dtypes, split, rngs=rngs)
        self.out = _linear(config.width, config.width, dtypes, scale=0.5 / config.depth, rngs=rngs)

    def __call__(
        self,
        x_BxTxD: jax.Array,
        position: Any,
        cache: Cache | None,
        segments: Segments | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Mix positions that start at `position`; with a cache, `x_BxTxD` has that position only.

        With segments, positions are those in the documents.
        """
        batch, length, width = x_BxTxD.shape
        shape = (batch, length, 3, self.heads, width // self.heads)
        q_BxTxHxK, k_BxTxHxK, v_BxTxHxK = jnp.moveaxis(self.qkv(x_BxTxD).reshape(shape), 2, 0)
        positions_T = position + jnp.arange(length) if segments is None else segments.positions_BxT
        q_BxTxHxK, k_BxTxHxK = (rotary(x, positions_T) for x in (q_BxTxHxK, k_BxTxHxK))
        if cache is None:
            mixed_BxTxHxK = causal_attention(q_BxTxHxK, k_BxTxHxK, v_BxTxHxK, segments)
        else:
            slots = cache.k_BxSxHxK.shape[1]
            write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(
                old, new.astype(old.dtype), position % slots, axis=1
            )
            cache = Cache(write(cache.k_BxSxHxK, k_BxTxHxK), write(cache.v_BxSxHxK, v_BxTxHxK))
            filled_S = jnp.arange(slots) <= position
            mixed_BxTxHxK = masked_attention(q_BxTxHxK, *cache, filled_S[None, :])
        return self.out(mixed_BxTxHxK.reshape(x_BxTxD.shape)), cache


class SwiGlu(nnx.Module):
    """A gated feed-forward layer, SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: Sizes, dtypes: Dtypes, *, rngs: nnx.Rngs):
        split = ColumnGroups((2, config.inner))
        self.up = _linear(config.width, 2 * config.inner, dtypes, split, rngs=rngs)
        self.down = _linear(config.inner, config.width, dtypes, scale=0.5 / config.depth, rngs=rngs)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        up = self.up(x_BxTxD)
        if up.ndim > x_BxTxD.ndim:  # in groups, as several devices compute it
            gate_BxTxF, value_BxTxF = jnp.moveaxis(up, -2, 0)
        else:
            gate_BxTxF, value_BxTxF = jnp.split(up, 2, axis=-1)
        return self.down(jax.nn.silu(gate_BxTxF) * value_BxTxF)


class Block(nnx.Module):
    """A pre-norm block: attention, then SwiGLU, each added to its input."""

    def __init__(self, config: Sizes, dtypes: Dtypes, *, rngs: nnx.Rngs):
        self.norm1 = _norm(config.width, dtypes, rngs=rngs)
        self.attention = Attention(config, dtypes, rngs=rngs)
        self.norm2 = _norm(config.width, dtypes, rngs=rngs)
        self.mlp = SwiGlu(config, dtypes, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(
        self,
        x_BxTxD: jax.Array,
        position: Any,
        cache: Cache | None,
        key: Key | None,
        segments: Segments | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        rngs = None if key is None else nnx.Rngs(dropout=key)
        drop = lambda y: self.dropout(y, deterministic=rngs is None, rngs=rngs)
        mixed_BxTxD, cache = self.attention(self.norm1(x_BxTxD), position, cache, segments)
        x_BxTxD = whole_features(x_BxTxD + drop(mixed_BxTxD))
        return x_BxTxD + drop(self.mlp(self.norm2(x_BxTxD))), cache


class Gpt(nnx.Module):
    """A decoder-only language model whose embedding and output head share one table.

    The parameters of all blocks are stacked along a leading axis, and the blocks run in a scan over
    it, so that one block is compiled for any depth.

    Args:
      vocabulary: size of the vocabulary; tokens are 0 to `vocabulary - 1`.
      width: number of features per token.
      depth: number of blocks.
      heads: number of attention heads; twice this number must divide the width.
      hidden: inner width of SwiGLU; None: 8/3 of the width, rounded to a multiple of 64.
      dropout: dropout rate of the outputs of attention and SwiGLU in training: 0 <= rate < 1.
      remat: what to rematerialise in the backward pass: nothing, all but matrix products, or whole
        blocks.
      loss_chunk: number of tokens whose float32 logits are in memory at once.
      dtype: dtype of the compute. Norms, softmax and logits are float32.
      param_dtype: dtype of the parameters.
      rngs: random streams of the initial parameters.

    Raises:
      ValueError: for a size that is not possible.

    >>> model = Gpt(5, width=8, depth=1, heads=2, rngs=nnx.Rngs(0))
    >>> model(jnp.array([[3, 1, 4]])).shape
    (1, 3, 5)
    """

    placement: ClassVar[tuple[str, ...]] = (
        # Rows, because a share of the columns would not be one of the heads: see `ColumnGroups`.
        "**/qkv/kernel=fsdp+tensor,-",
        "**/attention/out/kernel=tensor,-",
        "**/mlp/up/kernel=fsdp+tensor,-",
        "**/mlp/down/kernel=tensor,-",
    )
    """Placement of the parameters on a mesh with an axis `tensor`: each device computes a share of the
    heads and of the inner features (Shoeybi et al. 2019, "Megatron-LM", arXiv:1909.08053)."""

    def __init__(
        self,
        vocabulary: int,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        hidden: int | None = None,
        dropout: float = 0.0,
        remat: Literal["none", "dots", "full"] = "none",
        loss_chunk: int = 1024,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        _check_sizes(width, depth, heads, hidden, dropout, loss_chunk)
        dtypes = Dtypes(np.dtype(dtype), np.dtype(param_dtype))
        inner = hidden or max(round(width * 8 / 3 / 64), 1) * 64
        config = Sizes(width, depth, heads, inner, dropout)

        @nnx.split_rngs(splits=config.depth)
        @nnx.vmap
        def blocks(rngs: nnx.Rngs) -> Block:
            return Block(config, dtypes, rngs=rngs)

        self.config, self.remat, self.loss_chunk = config, remat, loss_chunk
        self.dtype = dtypes.dtype
        self.embed = nnx.Embed(
            vocabulary,
            config.width,
            **dtypes._asdict(),
            embedding_init=nnx.initializers.normal(0.02),
            rngs=rngs,
        )
        self.blocks = blocks(rngs)
        self.norm = _norm(config.width, dtypes, rngs=rngs)

    def score(
        self,
        tokens_BxT1: jax.Array,
        loss: TokenLoss,
        key: Key | None = None,
        segments: jax.Array | None = None,
    ) -> jax.Array:
        """Return the loss of each token but the first, given the tokens before it.

        Args:
          tokens_BxT1: integers, (batch, length + 1).
          loss: `loss(features_NxD, table_VxD, targets_N, chunk)` returns one loss per token; the
            logits are the product of features and table, for `chunk` tokens at a time. `loss` runs inside the network, so the network's
            policy applies to it, and it does not need the logits of all tokens in memory at once.
          key: key for dropout; None disables dropout.
          segments: int32, (batch, length), as in a call, of the tokens but the last.

        Returns:
          Losses, (batch, length).
        """
        x_BxTxD = self._features(tokens_BxT1[:, :-1], key, segments)
        x_NxD, targets_BxT = x_BxTxD.reshape(-1, x_BxTxD.shape[-1]), tokens_BxT1[:, 1:]
        losses_N = loss(x_NxD, self._table(x_NxD), targets_BxT.reshape(-1), self.loss_chunk)
        return losses_N.reshape(targets_BxT.shape)

    def __call__(self, tokens_BxT: jax.Array, segments: jax.Array | None = None) -> jax.Array:
        """Return the logits of the token after each token, float32 (batch, length, vocabulary).

        Args:
          tokens_BxT: integers, (batch, length).
          segments: int32, (batch, length), the number of each token's document, for rows of several:
            a token attends to its own document, whose positions begin at 0. None: one document.
        """
        return self._logits(self._features(tokens_BxT, None, segments))

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """Return an empty cache of `slots` positions for `decode`, for all blocks."""
        c = self.config
        shape = (c.depth, batch, slots, c.heads, c.width // c.heads)
        return Cache(*(jnp.zeros(shape, self.dtype) for _ in range(2)))

    def decode(self, token_B: jax.Array, position: Any, cache: Cache) -> tuple[jax.Array, Cache]:
        """Return the logits of the next token, float32 (batch, vocabulary), and the new cache.

        Args:
          token_B: integers, (batch,).
          position: position of the token, from 0; call `decode` for the positions in order.
          cache: keys and values of earlier positions. With more positions than slots, attention
            uses the latest positions.
        """
        x_Bx1xD, cache = self._blocks(self.embed(token_B[:, None]), None, position, cache)
        return self._logits(self.norm(x_Bx1xD))[:, 0], cache

    def _features(
        self, tokens_BxT: jax.Array, key: Key | None, ids_BxT: jax.Array | None
    ) -> jax.Array:
        segments = None if ids_BxT is None else Segments.of(ids_BxT)
        return self.norm(self._blocks(self.embed(tokens_BxT), key, segments=segments)[0])

    def _blocks(
        self,
        x_BxTxD: jax.Array,
        key: Key | None,
        position: Any = 0,
        cache: Cache | None = None,
        segments: Segments | None = None,
    ) -> Any:
        block, params = nnx.split(self.blocks)
        keys = (
            None
            if key is None or not self.config.dropout
            else jax.random.split(key, self.config.depth)
        )

        def body(x_BxTxD: jax.Array, part: Any) -> tuple[jax.Array, Any]:
            params, cache, key = part
            call = nnx.merge(block, params)
            x_BxTxD, cache = call(whole_features(x_BxTxD), position, cache, key, segments)
            return whole_features(x_BxTxD), cache

        if self.remat != "none":
            saved = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            policy = saved if self.remat == "dots" else None
            body = jax.checkpoint(body, policy=policy, prevent_cse=False)
        x_BxTxD, cache = jax.lax.scan(body, whole_features(x_BxTxD), (params, cache, keys))
        return whole_features(x_BxTxD), cache

    def _table(self, x: jax.Array) -> jax.Array:
        return self.embed.embedding[...].astype(x.dtype)

    def _logits(self, x_BxTxD: jax.Array) -> jax.Array:
        return jnp.einsum(
            "btd,vd->btv", x_BxTxD, self._table(x_BxTxD), preferred_element_type=jnp.float32
        )


def _linear(
    inputs: int,
    outputs: int,
    dtypes: Dtypes,
    product: Callable[..., jax.Array] = jax.lax.dot_general,
    *,
    scale: float = 1.0,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """Make a layer without bias; `scale` is the output variance for inputs of variance 1."""
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=False,
        **dtypes._asdict(),
        kernel_init=nnx.initializers.variance_scaling(scale, "fan_in", "truncated_normal"),
        dot_general=product,
        rngs=rngs,
    )


def _norm(width: int, dtypes: Dtypes, *, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """Make an RMSNorm; its statistics are float32 for all dtypes."""
    return nnx.RMSNorm(width, **dtypes._asdict(), rngs=rngs)


def _check_sizes(
    width: int, depth: int, heads: int, hidden: int | None, dropout: float, loss_chunk: int
) -> None:
    """Raise ValueError for a size that is not possible."""
    for name, value in {
        "width": width,
        "depth": depth,
        "heads": heads,
        "loss_chunk": loss_chunk,
    }.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
    if width % (2 * heads):
        raise ValueError(f"width is {width}; expected a multiple of 2 x heads ({2 * heads})")
    if hidden is not None and hidden < 1:
        raise ValueError(f"hidden is {hidden}; expected at least 1, or None")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; expected 0 <= dropout < 1")
