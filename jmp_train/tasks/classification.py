"""Classification: one label per example, or any number of labels."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jmp_train.tasks.masks import check_mask
from jmp_train.tasks.mixing import mixing
from jmp_train.tasks.task import Task
from jmp_train.types import Batch


def classification(
    inputs: str | tuple[str, ...] = "image",
    label: str = "label",
    *,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    label_smoothing: float = 0.0,
) -> Task:
    """Return the task of classifying examples by softmax cross-entropy.

    Args:
      inputs: names of the network's inputs in a batch; it returns logits, (batch, classes).
      label: name of the labels in a batch: integers from 0, (batch,).
      mixup: alpha of mixup, such as 0.2; 0 for none. Training steps mix each batch with a permutation
        of itself (`jmp_train.tasks.mixing`), with one share for the whole micro-batch.
      cutmix: alpha of CutMix, such as 1; 0 for none. With both, each batch gets one of the two, with
        equal probability.
      label_smoothing: share of the training target that is divided equally among all classes.

    Metrics: `accuracy`, and `loss` in nats, float32 under every precision. Predictions: `class`,
    int32, and `probability`, float32 (batch, classes). A mask is (batch,).

    The training loss of a mixed example is the sum of the losses of its two labels, each times its
    share, in float32; training accuracy counts the label of the larger share. Inputs are mixed in their
    own dtype as they come from the data, before the cast to the compute dtype. Held-out data are not
    mixed, and have the loss without smoothing.

    Raises:
      ValueError: for an alpha that is negative or not finite, a smoothing outside 0 to 1, and CutMix of
        several inputs.

    >>> task = classification(inputs="x", label="y")
    >>> logits, batch = jnp.array([[0.0, 1.0]]), {"y": jnp.array([1])}
    >>> task.metrics["accuracy"](logits, batch).tolist()
    [True]
    """

    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; expected 0 to below 1")
    names = (inputs,) if isinstance(inputs, str) else tuple(inputs)
    mix = mixing(names, label, mixup=mixup, cutmix=cutmix)
    mixes = bool(mixup or cutmix)

    def loss(logits: jax.Array, batch: Batch) -> jax.Array:
        _check_rank(logits)
        check_mask(batch, logits.shape[:1], "the loss")
        logits = logits.astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[label])

    def train_loss(logits: jax.Array, batch: Batch) -> jax.Array:
        losses = loss(logits, batch)
        if mixes:
            share = batch[f"{label}.share"]
            other = loss(logits, {**batch, label: batch[f"{label}.other"]})
            losses = share * losses + (1 - share) * other
        if label_smoothing:
            of_all = -jax.nn.log_softmax(logits.astype(jnp.float32)).mean(-1)
            losses = (1 - label_smoothing) * losses + label_smoothing * of_all
        return jnp.asarray(losses)

    return Task(
        loss=loss,
        train_loss=train_loss if mixes or label_smoothing else None,
        augment=mix if mixes else None,
        metrics={"accuracy": lambda logits, batch: logits.argmax(-1) == batch[label]},
        inputs=inputs,  # pyright: ignore[reportArgumentType]  (a name becomes a tuple)
        targets=(label,),
        metric="accuracy",
        highest=True,
        predict=lambda logits: {
            "class": logits.argmax(-1).astype(jnp.int32),
            "probability": jax.nn.softmax(logits.astype(jnp.float32)),
        },
    )


def multi_label(inputs: str | tuple[str, ...] = "image", labels: str = "labels") -> Task:
    """Return the task of finding all labels of an example, by binary cross-entropy of each.

    Args:
      inputs: names of the network's inputs in a batch; it returns logits, (batch, labels).
      labels: name of the labels in a batch: 0 or 1 for each, (batch, labels).

    Metrics: `f1`, the F1 score over all pairs of example and label, exact over unequal batches;
    `exact`, the share of examples with every label right; `loss` in nats per label, float32 under
    every precision. Predictions: `labels`, bool, and `probability`, float32 (batch, labels).

    A mask is (batch,), or (batch, labels) for examples whose labels are known in part: the others
    count nowhere, and an example without any is left out of `exact`.

    >>> logits, batch = jnp.array([[2.0, 2.0, -2.0]]), {"labels": jnp.array([[1, 0, 0]])}
    >>> values, weights = multi_label().metrics["f1"](logits, batch)
    >>> float(values.sum() / weights.sum())  # 2 TP / (2 TP + FP + FN)
    0.6666666865348816
    """

    def loss(logits: jax.Array, batch: Batch) -> jax.Array:
        _check_same_shape(logits, batch[labels], labels)
        check_mask(batch, logits.shape, "the loss")
        logits = logits.astype(jnp.float32)
        return optax.sigmoid_binary_cross_entropy(logits, batch[labels].astype(jnp.float32))

    def f1(logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        predicted, right = logits > 0, batch[labels] > 0
        twice = 2 * (predicted & right)
        return twice, twice + (predicted != right)

    def exact(logits: jax.Array, batch: Batch) -> jax.Array:
        right = (logits > 0) == (batch[labels] > 0)
        mask = batch.get("mask")
        return (right if mask is None or mask.ndim < 2 else right | ~mask).all(-1)

    return Task(
        loss=loss,
        metrics={"f1": f1, "exact": exact},
        inputs=inputs,  # pyright: ignore[reportArgumentType]
        targets=(labels,),
        metric="f1",
        highest=True,
        predict=lambda logits: {
            "labels": logits > 0,
            "probability": jax.nn.sigmoid(logits.astype(jnp.float32)),
        },
    )


def _check_rank(logits: Any) -> None:
    if getattr(logits, "ndim", 0) != 2:
        shape = getattr(logits, "shape", type(logits).__name__)
        raise ValueError(f"the network returned {shape}; expected logits of shape (batch, classes)")


def _check_same_shape(outputs: jax.Array, targets: Any, name: str) -> None:
    if outputs.shape != targets.shape:
        raise ValueError(
            f"the network returned shape {outputs.shape} and {name!r} has {targets.shape}; expected "
            "equal shapes"
        )
