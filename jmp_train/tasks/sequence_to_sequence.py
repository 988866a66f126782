"""Sequence to sequence: an output text for each input text, token by token."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jmp_train.tasks.masks import check_mask
from jmp_train.tasks.task import Task
from jmp_train.tasks.token_losses import logits_losses
from jmp_train.types import Batch, Function


def sequence_to_sequence(
    source: str = "source", target: str = "target", *, padding: int = 0
) -> Task:
    """Return the task of predicting each token of a target from the source and the tokens before it.

    Args:
      source: name of the input tokens in a batch: integers, (batch, source length).
      target: name of the output tokens in a batch: integers, (batch, length + 1). The first token
        starts every target.
      padding: the token after the end of a shorter target, which is not scored.

    The network is called with the source and all but the last token of the target. It returns logits,
    (batch, length, vocabulary); those of a position must not depend on later tokens of the target.

    Metrics: `token_accuracy`, the share of right tokens given the right tokens before them, and
    `loss` in nats per token, both exact over targets of different length. Predictions: `tokens`,
    int32 (batch, length), the most probable token at each position given those predicted before it.
    A mask is (batch,), or (batch, length) for the tokens of the target but the first.
    """

    def right(batch: Batch) -> jax.Array:
        return jnp.asarray(batch[target][:, 1:], jnp.int32)

    def scored(batch: Batch) -> jax.Array:
        return right(batch) != padding

    def loss(logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        mask = scored(batch)
        check_mask(batch, mask.shape, "the losses of the tokens but the first")
        return jnp.where(mask, logits_losses(logits, right(batch)), 0.0), mask

    def accuracy(logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        mask = scored(batch)
        return (logits.argmax(-1) == right(batch)) & mask, mask

    def call(net: Function, batch: Batch) -> jax.Array:
        return net(batch[source], batch[target][:, :-1])

    def decode(net: Function, batch: Batch) -> jax.Array:
        start_Bx1 = batch[target][:, :1].astype(jnp.int32)
        length = batch[target].shape[1] - 1
        tokens_BxT = jnp.pad(start_Bx1, ((0, 0), (0, length)), constant_values=padding)

        def step(tokens_BxT: jax.Array, position: jax.Array) -> tuple[jax.Array, None]:
            logits_BxTxV = net(batch[source], tokens_BxT[:, :-1])
            likeliest_BxT = logits_BxTxV.argmax(-1).astype(jnp.int32)
            new_B = jnp.take(likeliest_BxT, position, axis=1)
            return tokens_BxT.at[:, position + 1].set(new_B), None

        return jax.lax.scan(step, tokens_BxT, jnp.arange(length))[0][:, 1:]

    return Task(
        loss=loss,
        metrics={"token_accuracy": accuracy},
        inputs=(source,),
        targets=(target,),
        metric="loss",
        call=call,
        predict_call=decode,
        predict=lambda tokens: {"tokens": tokens},
    )
