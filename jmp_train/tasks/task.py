"""A task as pure functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax

from jmp_train.types import Function, Key, PyTree


class Task(NamedTuple):
    """A network with its loss, metrics and prediction, as pure functions."""

    init: Callable[[Key], PyTree]
    """`init(key) -> params`."""
    loss_fn: Function
    """`loss_fn(params, batch, *, key)`, for `make_step`."""
    metrics_fn: Callable[..., dict[str, jax.Array]]
    """`metrics_fn(params, batch)`, for `make_evaluate`."""
    generate: Callable[..., jax.Array] | None = None
    """`generate(params, prompt, key, length=..., temperature=...)` continues a text; None if the
    task does not generate text.

    Raises ValueError for an empty prompt, for a length below 1, and for a temperature that is
    negative or not finite."""
