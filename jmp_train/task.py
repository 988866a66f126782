"""The contracts between data, models and training: what each hands to the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np


class DataSpec(NamedTuple):
    """What a model must know of its data."""

    features: int  # numbers in one example; of a text, the length of its windows
    classes: int  # labels, or words of a text, are 0 to classes - 1


class Dataset(NamedTuple):
    """Arrays by name, the first axis counting examples.

    A `"mask"` among the held-out ones, bool, says which values of the metrics count.
    """

    train: dict[str, np.ndarray]
    eval: dict[str, np.ndarray]
    spec: DataSpec
    augment: Any = None  # (batch, numpy Generator) -> batch, for training; None does nothing
    facts: Callable[[], dict[str, Any]] = dict  # what summary.json says of the data


class Task(NamedTuple):
    """A model and what it is trained for, as pure functions."""

    init: Callable[[jax.Array], Any]
    """`init(key) -> params`."""
    loss_fn: Callable[..., Any]
    """`loss_fn(params, batch, *, key)`, for `training.make_step`."""
    metrics_fn: Callable[..., dict[str, jax.Array]]
    """`metrics_fn(params, batch)`, for `training.make_evaluate`."""
    generate: Callable[..., jax.Array] | None = None
    """`generate(params, prompt, key, length=..., temperature=...)` continues a text; None cannot.

    Raises ValueError for an empty prompt, a length below 1 and a temperature below 0 or not finite."""
    reads: tuple[str, ...] = ()
    """Names of the arrays that it needs in a batch; a run refuses data without them."""
