"""Language modelling: prediction of each token of a text from the tokens before it."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jmp_train.flax.functional import Functional
from jmp_train.policy.precision import Precision
from jmp_train.spec import DataSpec
from jmp_train.tasks.task import Task
from jmp_train.tasks.token_losses import token_losses
from jmp_train.types import Batch, Key, PyTree


def language_modelling(net: Functional, model: Any, spec: DataSpec, precision: Precision) -> Task:
    """Return the task of predicting each token of `batch["tokens"]`, (batch, length + 1).

    Args:
      net: network with the methods `score`, `empty_cache` and `decode` of `models.gpt.Gpt`.
      model: configuration of the network; `loss_chunk` is the number of tokens whose logits are in
        memory at once, `dropout` the dropout rate.
      spec: spec of the data; its length of a window is the context length of generated text.
      precision: unused, because losses are float32 under every precision.
    """
    del precision

    def token_loss(x_NxD: jax.Array, table_VxD: jax.Array, targets_N: jax.Array) -> jax.Array:
        return token_losses(x_NxD, table_VxD, targets_N, model.loss_chunk)

    def losses(params: PyTree, batch: Batch, key: Key | None) -> jax.Array:
        key = None if model.dropout == 0 else key
        tokens = batch["tokens"].astype(jnp.int32)
        return net.apply(params, tokens, token_loss, key, method="score")

    def loss_fn(params: PyTree, batch: Batch, *, key: Key | None = None) -> PyTree:
        loss = losses(params, batch, key).mean()
        return loss, {"bits_per_byte": loss / math.log(2)}

    def metrics_fn(params: PyTree, batch: Batch) -> dict[str, jax.Array]:
        loss = losses(params, batch, None)
        return {"bits_per_byte": loss / math.log(2), "loss": loss}

    def generate(
        params: PyTree, prompt_P: jax.Array, key: Key, *, length: int, temperature: Any
    ) -> jax.Array:
        prompt_P = jnp.asarray(prompt_P)
        _check_generate(prompt_P, length, temperature)

        def step(carry: PyTree, position: jax.Array) -> PyTree:
            token, cache = carry
            logits_BxV, cache = net.apply(params, token[None], position, cache, method="decode")
            drawn = _draw(logits_BxV[0], jax.random.fold_in(key, position), temperature)
            following = jnp.minimum(position + 1, len(prompt_P) - 1)
            token = jnp.where(position + 1 < len(prompt_P), prompt_P[following], drawn)
            return (token, cache), token

        cache = net.apply(params, 1, spec.size("tokens") - 1, method="empty_cache")
        prompt_P = prompt_P.astype(jnp.int32)
        positions = jnp.arange(len(prompt_P) - 1 + length)
        _, tokens = jax.lax.scan(step, (prompt_P[0], cache), positions)
        return tokens[len(prompt_P) - 1 :]

    return Task(net.init, loss_fn, metrics_fn, generate)


def _check_generate(prompt_P: jax.Array, length: Any, temperature: Any) -> None:
    """Raise ValueError for an invalid argument of `generate`; of a tracer, only shape and dtype."""
    if prompt_P.ndim != 1 or not len(prompt_P) or not jnp.issubdtype(prompt_P.dtype, jnp.integer):
        raise ValueError(
            f"the prompt has shape {prompt_P.shape} and dtype {prompt_P.dtype}; expected integers of "
            "shape (tokens,), at least one"
        )
    if not isinstance(length, (int, np.integer)) or length < 1:
        raise ValueError(f"length is {length}; expected a whole number of at least 1")
    if isinstance(temperature, Tracer):
        return
    if np.ndim(temperature) or not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; expected a number of 0 or more")


def _draw(logits_V: jax.Array, key: Key, temperature: Any) -> jax.Array:
    """Sample a token at a temperature; at temperature 0, return the most probable token."""
    warm = jax.random.categorical(key, logits_V / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, warm, logits_V.argmax()).astype(jnp.int32)
