"""What a network is trained for, as pure functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Task(NamedTuple):
    """A network and what it is trained for, as pure functions."""

    init: Callable[[jax.Array], Any]
    """`init(key) -> params`."""
    loss_fn: Callable[..., Any]
    """`loss_fn(params, batch, *, key)`, for `make_step`."""
    metrics_fn: Callable[..., dict[str, jax.Array]]
    """`metrics_fn(params, batch)`, for `make_evaluate`."""
    generate: Callable[..., jax.Array] | None = None
    """`generate(params, prompt, key, length=..., temperature=...)` continues a text; None cannot.

    Raises ValueError for an empty prompt, a length below 1 and a temperature below 0 or not finite."""
