"""Regression: numbers predicted by least squares."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jmp_train.tasks.masks import check_mask
from jmp_train.tasks.task import Task
from jmp_train.types import Batch


def regression(inputs: str | tuple[str, ...] = "x", target: str = "y") -> Task:
    """Return the task of predicting numbers by their squared error.

    Args:
      inputs: names of the network's inputs in a batch; it returns numbers in the shape of the target,
        or with a last axis of 1 more.
      target: name of the numbers in a batch, (batch, ...).

    Metrics: `mse`, the mean squared error, which is the loss too, and `mae`, the mean absolute error,
    both in float32 and over all numbers. Predictions: `value`, float32. A mask has the shape of the
    target, or its first axes.

    >>> outputs, batch = jnp.array([[1.0], [3.0]]), {"y": jnp.array([1.0, 1.0])}
    >>> regression().loss(outputs, batch).tolist()
    [0.0, 4.0]
    """

    def errors(outputs: jax.Array, batch: Batch) -> jax.Array:
        wanted = batch[target]
        if outputs.shape == (*wanted.shape, 1):
            outputs = outputs[..., 0]
        if outputs.shape != wanted.shape:
            raise ValueError(
                f"the network returned shape {outputs.shape} and {target!r} has {wanted.shape}; "
                "expected equal shapes"
            )
        check_mask(batch, wanted.shape, "the target")
        return outputs.astype(jnp.float32) - wanted.astype(jnp.float32)

    def mse(outputs: jax.Array, batch: Batch) -> jax.Array:
        return jnp.square(errors(outputs, batch))

    return Task(
        loss=mse,
        metrics={"mse": mse, "mae": lambda o, batch: jnp.abs(errors(o, batch))},
        inputs=inputs,  # pyright: ignore[reportArgumentType]  (a name becomes a tuple)
        targets=(target,),
        metric="mse",
        predict=lambda outputs: {"value": outputs.astype(jnp.float32)},
    )
