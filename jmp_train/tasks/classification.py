"""Classification of images into labels by softmax cross-entropy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jmp_train.flax.functional import Functional
from jmp_train.policy.precision import Precision
from jmp_train.spec import DataSpec
from jmp_train.tasks.task import Task
from jmp_train.types import Batch, Key, PyTree


def classification(net: Functional, model: Any, spec: DataSpec, precision: Precision) -> Task:
    """Return the task of classifying `batch["image"]` into `batch["label"]`.

    Args:
      net: network that maps images, (batch, ...), to logits, (batch, classes).
      model: configuration of the network; with a `dropout` above 0, its call gets random streams.
      spec: unused; in the signature of all tasks.
      precision: precision of the network; the logits of the loss have its output dtype.
    """
    del spec
    drops = getattr(model, "dropout", 0) > 0

    def losses(params: PyTree, batch: Batch, key: Key | None) -> tuple[jax.Array, jax.Array]:
        logits = net.apply(params, batch["image"], key=key if drops else None)
        logits = precision.model.cast_to_output(logits)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return loss, logits.argmax(-1) == batch["label"]

    def loss_fn(params: PyTree, batch: Batch, *, key: Key | None = None) -> PyTree:
        loss, correct = losses(params, batch, key)
        return loss.mean(), {"accuracy": correct.astype(jnp.float32).mean()}

    def metrics_fn(params: PyTree, batch: Batch) -> dict[str, jax.Array]:
        loss, correct = losses(params, batch, None)
        return {"loss": loss, "accuracy": correct}

    return Task(net.init, loss_fn, metrics_fn)
