"""Classification of images into labels by softmax cross-entropy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jmp_train.flax.functional import Functional
from jmp_train.policy.precision import Precision
from jmp_train.spec import DataSpec
from jmp_train.tasks.task import Task


def classification(net: Functional, model: Any, spec: DataSpec, precision: Precision) -> Task:
    """Return the task of classifying `batch["image"]` into `batch["label"]`.

    Args:
      net: maps images, (batch, ...), to logits, (batch, classes). With dropout, its call takes
        `rngs=`.
      model: the model's configuration; a `dropout` above 0 asks for random streams.
      spec: the data's; not needed here.
      precision: its output dtype is that of the logits in the loss.
    """
    del spec
    drops = getattr(model, "dropout", 0) > 0

    def losses(params: Any, batch: Any, key: Any) -> tuple[jax.Array, jax.Array]:
        streams = {"rngs": nnx.Rngs(dropout=key)} if drops and key is not None else {}
        logits = net.apply(params, batch["image"], **streams)
        logits = precision.model.cast_to_output(logits)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return loss, logits.argmax(-1) == batch["label"]

    def loss_fn(params: Any, batch: Any, *, key: Any = None) -> Any:
        loss, correct = losses(params, batch, key)
        return loss.mean(), {"accuracy": correct.astype(jnp.float32).mean()}

    def metrics_fn(params: Any, batch: Any) -> dict[str, jax.Array]:
        loss, correct = losses(params, batch, None)
        return {"loss": loss, "accuracy": correct}

    return Task(net.init, loss_fn, metrics_fn)
