"""A decoder-only language model over bytes: RMSNorm, rotary positions, SwiGLU, one compiled block."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from jmp_train.fields import check_fields
from jmp_train.flax import apply_policy
from jmp_train.models.attention import causal_attention, masked_attention, rotary
from jmp_train.models.token_losses import token_losses
from jmp_train.precision.policy import Policy, get_policy
from jmp_train.precision.rules import NO_RULES, Rules
from jmp_train.task import DataSpec, Task


class Cache(NamedTuple):
    """The keys and values of the last S positions; position p lies in slot p modulo S."""

    k_BxSxHxK: jax.Array
    v_BxSxHxK: jax.Array


class Attention(nnx.Module):
    """Causal self-attention with rotary positions, without biases."""

    def __init__(self, config: GptConfig, policy: Policy, *, rngs: nnx.Rngs):
        self.heads = config.heads
        self.qkv = _linear(config.width, 3 * config.width, policy, rngs=rngs)
        self.out = _linear(config.width, config.width, policy, 0.5 / config.depth, rngs=rngs)

    def __call__(
        self, x_BxTxD: jax.Array, position: Any, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        """With a cache, `x_BxTxD` is the one position `position`; without, it begins there."""
        batch, length, width = x_BxTxD.shape
        shape = (batch, length, 3, self.heads, width // self.heads)
        q_BxTxHxK, k_BxTxHxK, v_BxTxHxK = jnp.moveaxis(self.qkv(x_BxTxD).reshape(shape), 2, 0)
        positions_T = position + jnp.arange(length)
        q_BxTxHxK, k_BxTxHxK = (rotary(x, positions_T) for x in (q_BxTxHxK, k_BxTxHxK))
        if cache is None:
            mixed_BxTxHxK = causal_attention(q_BxTxHxK, k_BxTxHxK, v_BxTxHxK)
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
    """Two linear layers, the first gated by SiLU of another (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: GptConfig, policy: Policy, *, rngs: nnx.Rngs):
        self.up = _linear(config.width, 2 * config.inner, policy, rngs=rngs)
        self.down = _linear(config.inner, config.width, policy, 0.5 / config.depth, rngs=rngs)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        gate_BxTxF, value_BxTxF = jnp.split(self.up(x_BxTxD), 2, axis=-1)
        return self.down(jax.nn.silu(gate_BxTxF) * value_BxTxF)


class Block(nnx.Module):
    """A pre-norm block: attention, then the gated layers, each added to what came in."""

    def __init__(self, config: GptConfig, policy: Policy, *, rngs: nnx.Rngs):
        self.norm1 = _norm(config.width, policy, rngs=rngs)
        self.attention = Attention(config, policy, rngs=rngs)
        self.norm2 = _norm(config.width, policy, rngs=rngs)
        self.mlp = SwiGlu(config, policy, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(
        self, x_BxTxD: jax.Array, position: Any, cache: Cache | None, key: Any
    ) -> tuple[jax.Array, Cache | None]:
        rngs = None if key is None else nnx.Rngs(dropout=key)
        drop = lambda y: self.dropout(y, deterministic=rngs is None, rngs=rngs)
        mixed_BxTxD, cache = self.attention(self.norm1(x_BxTxD), position, cache)
        x_BxTxD = x_BxTxD + drop(mixed_BxTxD)
        return x_BxTxD + drop(self.mlp(self.norm2(x_BxTxD))), cache


class Gpt(nnx.Module):
    """Blocks between an embedding and an output head that are one table.

    The parameters of all blocks are stacked along a first axis, over which the blocks are scanned:
    one block is compiled, whatever the depth.

    Args:
      config: the sizes.
      vocabulary: words; tokens are 0 to `vocabulary - 1`.
      policy: dtypes of the parameters and of the compute. Norms and softmax are float32 inside, and
        so are logits and losses.
      rngs: where the initial parameters come from.
    """

    def __init__(self, config: GptConfig, vocabulary: int, policy: Policy, *, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=config.depth)
        @nnx.vmap
        def blocks(rngs: nnx.Rngs) -> Block:
            return Block(config, policy, rngs=rngs)

        self.config = config
        self.compute_dtype = policy.compute_dtype
        self.embed = nnx.Embed(
            vocabulary,
            config.width,
            dtype=policy.compute_dtype,
            param_dtype=policy.param_dtype,
            embedding_init=nnx.initializers.normal(0.02),
            rngs=rngs,
        )
        self.blocks = blocks(rngs)
        self.norm = _norm(config.width, policy, rngs=rngs)

    def losses(self, tokens_BxT1: jax.Array, key: Any = None) -> jax.Array:
        """The cross-entropy of each token but the first, given those before it.

        Args:
          tokens_BxT1: integers, (batch, length + 1).
          key: of dropout; None drops nothing.

        Returns:
          float32 (batch, length), in nats.
        """
        x_BxTxD = self._features(tokens_BxT1[:, :-1], key)
        x_NxD, targets_BxT = x_BxTxD.reshape(-1, x_BxTxD.shape[-1]), tokens_BxT1[:, 1:]
        losses_N = token_losses(
            x_NxD, self._table(x_NxD), targets_BxT.reshape(-1), self.config.loss_chunk
        )
        return losses_N.reshape(targets_BxT.shape)

    def logits(self, tokens_BxT: jax.Array) -> jax.Array:
        """What each token says of the next: float32 (batch, length, vocabulary)."""
        return self._logits(self._features(tokens_BxT, None))

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """A cache for `decode`, of all blocks, that remembers `slots` positions."""
        c = self.config
        shape = (c.depth, batch, slots, c.heads, c.width // c.heads)
        return Cache(*(jnp.zeros(shape, self.compute_dtype) for _ in range(2)))

    def decode(self, token_B: jax.Array, position: Any, cache: Cache) -> tuple[jax.Array, Cache]:
        """One position: the logits of the next token, float32 (batch, vocabulary), and the cache.

        Args:
          token_B: integers, (batch,).
          position: of this token, from 0; each of those before it has been given before.
          cache: of the positions before. With more positions than slots, attention sees the newest.
        """
        x_Bx1xD, cache = self._blocks(self.embed(token_B[:, None]), None, position, cache)
        return self._logits(self.norm(x_Bx1xD))[:, 0], cache

    def _features(self, tokens_BxT: jax.Array, key: Any) -> jax.Array:
        return self.norm(self._blocks(self.embed(tokens_BxT), key)[0])

    def _blocks(self, x_BxTxD: jax.Array, key: Any, position: Any = 0, cache: Any = None) -> Any:
        block, params = nnx.split(self.blocks)
        keys = None if key is None else jax.random.split(key, self.config.depth)

        def body(x_BxTxD: jax.Array, part: Any) -> tuple[jax.Array, Any]:
            params, cache, key = part
            return nnx.merge(block, params)(x_BxTxD, position, cache, key)

        if self.config.remat != "none":
            saved = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            policy = saved if self.config.remat == "dots" else None
            body = jax.checkpoint(body, policy=policy, prevent_cse=False)
        return jax.lax.scan(body, x_BxTxD, (params, cache, keys))

    def _table(self, x: jax.Array) -> jax.Array:
        return self.embed.embedding[...].astype(x.dtype)

    def _logits(self, x_BxTxD: jax.Array) -> jax.Array:
        return jnp.einsum(
            "btd,vd->btv", x_BxTxD, self._table(x_BxTxD), preferred_element_type=jnp.float32
        )


@dataclasses.dataclass(frozen=True)
class GptConfig:
    """Byte-level language model."""

    metric: ClassVar[str] = "bits_per_byte"
    highest: ClassVar[bool] = False

    width: int = 128
    """Features of each token."""
    depth: int = 4
    """Blocks."""
    heads: int = 4
    """Attention heads; the width is a multiple of twice as many."""
    hidden: int | None = None
    """Width between the gated layers; None: 8/3 of the width, rounded to a multiple of 64."""
    dropout: float = 0.0
    """Share of what each block adds that is set to zero in training, from 0 to below 1."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass computes again: nothing, all but matrix products, or whole blocks."""
    loss_chunk: int = 1024
    """Tokens whose float32 logits are in memory at once."""

    def __post_init__(self) -> None:
        check_fields(self)
        for field in ("width", "depth", "heads", "loss_chunk"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; expected at least 1")
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width is {self.width}; expected a multiple of 2 x heads ({2 * self.heads})"
            )
        if self.hidden is not None and self.hidden < 1:
            raise ValueError(f"hidden is {self.hidden}; expected at least 1, or None")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; expected 0 <= dropout < 1")

    @property
    def inner(self) -> int:
        """The width between the gated layers."""
        return self.hidden or max(round(self.width * 8 / 3 / 64), 1) * 64

    def task(self, data: DataSpec, policy: Policy, rules: Rules = NO_RULES) -> Task:
        """Predicting each byte of a text from those before it.

        Args:
          data: gives the vocabulary, and the length beyond which generated text forgets.
          policy: of the whole network.
          rules: where there are any, they give each module its policy instead. The blocks are one
            module, `blocks`, because they are compiled as one.
        """
        if rules.entries:
            policy = rules.policy_of("")

        def make(key: jax.Array) -> Gpt:
            own = get_policy("float32") if rules.entries else policy
            net = Gpt(self, data.classes, own, rngs=nnx.Rngs(params=key))
            return apply_policy(net, rules) if rules.entries else net

        graph, *_ = nnx.split(nnx.eval_shape(make, jax.random.key(0)), nnx.Param, ...)

        def init(key: jax.Array) -> Any:
            return nnx.to_pure_dict(nnx.state(make(key), nnx.Param))

        def losses(params: Any, batch: Any, key: Any) -> jax.Array:
            key = None if self.dropout == 0 else key
            return nnx.merge(graph, params).losses(batch["tokens"].astype(jnp.int32), key)

        def loss_fn(params: Any, batch: Any, *, key: Any = None) -> Any:
            loss = losses(params, batch, key).mean()
            return loss, {"bits_per_byte": loss / math.log(2)}

        def metrics_fn(params: Any, batch: Any) -> dict[str, jax.Array]:
            loss = losses(params, batch, None)
            return {"bits_per_byte": loss / math.log(2), "loss": loss}

        def generate(
            params: Any, prompt_P: jax.Array, key: jax.Array, *, length: int, temperature: Any
        ) -> jax.Array:
            prompt_P = jnp.asarray(prompt_P)
            _check_generate(prompt_P, length, temperature)

            def step(carry: Any, position: jax.Array) -> Any:
                token, cache = carry
                net = nnx.merge(graph, params)
                logits_BxV, cache = net.decode(token[None], position, cache)
                drawn = _draw(logits_BxV[0], jax.random.fold_in(key, position), temperature)
                following = jnp.minimum(position + 1, len(prompt_P) - 1)
                token = jnp.where(position + 1 < len(prompt_P), prompt_P[following], drawn)
                return (token, cache), token

            cache = nnx.merge(graph, params).empty_cache(1, data.features)
            prompt_P = prompt_P.astype(jnp.int32)
            positions = jnp.arange(len(prompt_P) - 1 + length)
            _, tokens = jax.lax.scan(step, (prompt_P[0], cache), positions)
            return tokens[len(prompt_P) - 1 :]

        return Task(init, loss_fn, metrics_fn, generate, reads=("tokens",))


def _check_generate(prompt_P: jax.Array, length: Any, temperature: Any) -> None:
    """Raises ValueError for what no text can be continued with; of traced values only shapes count."""
    if prompt_P.ndim != 1 or not len(prompt_P) or not jnp.issubdtype(prompt_P.dtype, jnp.integer):
        raise ValueError(
            f"the prompt has shape {prompt_P.shape} and dtype {prompt_P.dtype}; expected integers of "
            "shape (words,), at least one"
        )
    if not isinstance(length, (int, np.integer)) or length < 1:
        raise ValueError(f"length is {length}; expected a whole number of at least 1")
    if isinstance(temperature, Tracer):
        return
    if np.ndim(temperature) or not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; expected a number of 0 or more")


def _draw(logits_V: jax.Array, key: jax.Array, temperature: Any) -> jax.Array:
    """A word by its probability at a temperature; at 0 the likeliest."""
    warm = jax.random.categorical(key, logits_V / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, warm, logits_V.argmax()).astype(jnp.int32)


def _linear(
    inputs: int, outputs: int, policy: Policy, scale: float = 1.0, *, rngs: nnx.Rngs
) -> nnx.Linear:
    """Without a bias; `scale` is the variance of an output for inputs of variance 1."""
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=False,
        dtype=policy.compute_dtype,
        param_dtype=policy.param_dtype,
        kernel_init=nnx.initializers.variance_scaling(scale, "fan_in", "truncated_normal"),
        rngs=rngs,
    )


def _norm(width: int, policy: Policy, *, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """Its statistics are float32 whatever the policy."""
    return nnx.RMSNorm(width, dtype=policy.compute_dtype, param_dtype=policy.param_dtype, rngs=rngs)
