"""A jitted function that donates its state and says so where it is given one that is gone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax


class Donating:
    """`jax.jit(function, donate_argnums=0)` for a function of a state and a batch.

    Everything that a jitted function has is there (`lower`, `trace`, `__wrapped__`, ...). A call with
    a state that an earlier call took raises a ValueError that says what to do.
    """

    def __init__(self, function: Callable[[Any, Any], Any]):
        self._jitted = jax.jit(function, donate_argnums=0)
        functools.update_wrapper(self, function)

    def __call__(self, state: Any, batch: Any) -> Any:
        try:
            return self._jitted(state, batch)
        except (RuntimeError, ValueError):
            if not any(isinstance(x, jax.Array) and x.is_deleted() for x in jax.tree.leaves(state)):
                raise
        raise ValueError(
            "this state was donated to an earlier step, which reused its memory; expected the state "
            "that the last step returned: state, info = stepper.step(state, batch). To keep a copy: "
            "jax.tree.map(jnp.copy, state), before the step"
        )

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        return self._jitted.lower(*args, **kwargs)

    def trace(self, *args: Any, **kwargs: Any) -> jax.stages.Traced:
        return self._jitted.trace(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._jitted, name)
