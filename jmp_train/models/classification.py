"""Classification: the loss and the metrics that every classifier here shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jmp_train.precision.policy import Policy
from jmp_train.task import Task


def classification(
    init: Callable[[jax.Array], Any], apply: Callable[..., jax.Array], policy: Policy
) -> Task:
    """Classification of `batch["image"]` into `batch["label"]` by softmax cross-entropy.

    Args:
      init: `init(key) -> params`.
      apply: `apply(params, image, key)`, key None in evaluation, returns logits, (batch, classes).
      policy: the logits are cast to its output dtype before the loss.
    """

    def losses(params: Any, batch: Any, key: Any) -> tuple[jax.Array, jax.Array]:
        logits = policy.cast_to_output(apply(params, batch["image"], key))
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return loss, logits.argmax(-1) == batch["label"]

    def loss_fn(params: Any, batch: Any, *, key: Any = None) -> Any:
        loss, correct = losses(params, batch, key)
        return loss.mean(), {"accuracy": correct.astype(jnp.float32).mean()}

    def metrics_fn(params: Any, batch: Any) -> dict[str, jax.Array]:
        loss, correct = losses(params, batch, None)
        return {"loss": loss, "accuracy": correct}

    return Task(init, loss_fn, metrics_fn, reads=("image", "label"))
