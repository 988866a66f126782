"""Language modelling: prediction of each token of a text from the tokens before it."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jmp_train.spec import DataSpec
from jmp_train.tasks.masks import check_mask
from jmp_train.tasks.task import Task
from jmp_train.tasks.token_losses import logits_losses, token_losses
from jmp_train.types import Batch, Key, PyTree


def language_modelling(tokens: str = "tokens") -> Task:
    """Return the task of predicting each token of `batch[tokens]`, (batch, length + 1).

    A network with a method `score(tokens, loss)`, as `jmp_train.models.Gpt` has, computes its losses
    itself, so that the logits of all tokens need not be in memory at once. Any other network is
    called with the tokens but the last, and returns logits, (batch, length, vocabulary), each from
    the tokens up to its own.

    Metrics: `bits_per_byte`, and `loss` in nats per token. If a batch has `target_bytes`, (batch,
    length), the bytes that each token but the first stands for, bits are divided by them; otherwise a
    token is a byte. Losses are float32 under every precision. Predictions: `loss`, float32 (batch, length), of each
    token but the first; `logits`, float32 (batch, vocabulary), of the last token. The task also generates texts, with a network that
    has the methods `empty_cache` and `decode` of `Gpt`, or else by calls with a window of tokens.

    A mask is (batch,), or (batch, length) for the tokens but the first. If a batch has `segments`,
    int32 (batch, length), the numbers of the documents of the tokens but the last, the network gets
    them as `segments=`, and the mask says which predictions stay within a document.

    Args:
      tokens: name of the tokens in a batch, integers.
    """

    def losses(net: Any, batch: Batch) -> jax.Array:
        tokens_BxT1 = batch[tokens].astype(jnp.int32)
        check_mask(batch, tokens_BxT1[:, 1:].shape, "the losses of the tokens but the first")
        if net.has("score"):
            return _call(net, batch, tokens_BxT1, token_losses, method="score")
        return logits_losses(_call(net, batch, tokens_BxT1[:, :-1]), tokens_BxT1[:, 1:])

    def score(net: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        tokens_BxT1 = batch[tokens].astype(jnp.int32)
        logits_BxTxV = _call(net, batch, tokens_BxT1[:, :-1])
        return losses(net, batch), logits_BxTxV[:, -1].astype(jnp.float32)

    return Task(
        loss=lambda losses, batch: losses,
        metrics={"bits_per_byte": _bits_per_byte},
        inputs=(tokens,),
        metric="bits_per_byte",
        call=losses,
        predict_call=score,
        predict=lambda scored: {"loss": scored[0], "logits": scored[1]},
        generate=functools.partial(_generate, tokens),
    )


def _bits_per_byte(losses: jax.Array, batch: Batch) -> Any:
    """Return the bits of each token, and if tokens are not bytes its bytes, as weights."""
    bits = losses / math.log(2)
    if "target_bytes" not in batch:
        return bits
    sizes = batch["target_bytes"]
    if sizes.shape != losses.shape:
        raise ValueError(
            f"'target_bytes' has shape {sizes.shape}; expected {losses.shape}, the tokens but the first"
        )
    return bits, sizes


def _call(net: Any, batch: Batch, *args: Any, **options: Any) -> jax.Array:
    """Call a network, with the segments of a batch if it has them."""
    if "segments" not in batch:
        return net(*args, **options)
    try:
        return net(*args, segments=batch["segments"], **options)
    except TypeError as error:
        if "'segments'" not in str(error):
            raise
        raise ValueError(
            "the rows are packed, and the network takes no argument 'segments'; expected one that does, "
            "as Gpt, or data that are not packed"
        ) from None


def _generate(
    name: str,
    net: Any,
    spec: DataSpec,
    prompt_P: jax.Array,
    key: Key,
    *,
    length: int,
    temperature: Any,
) -> jax.Array:
    prompt_P = jnp.asarray(prompt_P)
    _check_generate(prompt_P, length, temperature)
    prompt_P = prompt_P.astype(jnp.int32)
    window = spec.size(name) - 1
    start, logits_of = (_cached if net.has("decode") else _in_window)(net, window)

    def step(carry: PyTree, position: jax.Array) -> PyTree:
        token, memory = carry
        logits_V, memory = logits_of(token, position, memory)
        drawn = _draw(logits_V, jax.random.fold_in(key, position), temperature)
        following = jnp.minimum(position + 1, len(prompt_P) - 1)
        token = jnp.where(position + 1 < len(prompt_P), prompt_P[following], drawn)
        return (token, memory), token

    positions = jnp.arange(len(prompt_P) - 1 + length)
    _, tokens = jax.lax.scan(step, (prompt_P[0], start), positions)
    return tokens[len(prompt_P) - 1 :]


def _cached(net: Any, window: int) -> Any:
    """Return an empty cache of keys and values, and a function that returns the next logits."""

    def logits_of(token: jax.Array, position: jax.Array, cache: PyTree) -> PyTree:
        logits_BxV, cache = net(token[None], position, cache, method="decode")
        return logits_BxV[0], cache

    return net(1, window, method="empty_cache"), logits_of


def _in_window(net: Any, window: int) -> Any:
    """Return an empty window of tokens, and a function that returns the next logits."""

    def logits_of(token: jax.Array, position: jax.Array, tokens_T: jax.Array) -> PyTree:
        full = position >= window
        tokens_T = jnp.where(full, jnp.roll(tokens_T, -1), tokens_T)
        at = jnp.minimum(position, window - 1)
        tokens_T = tokens_T.at[at].set(token)
        return net(tokens_T[None])[0, at].astype(jnp.float32), tokens_T

    return jnp.zeros(window, jnp.int32), logits_of


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
