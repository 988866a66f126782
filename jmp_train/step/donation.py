"""A jitted step that donates its state, leaves it where it lies, and says so where it is gone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer

DONATED = (
    "this state was donated to an earlier step, which reused its memory; expected the state that the "
    "last step returned: state, info = stepper.step(state, batch). To keep a copy: "
    "jax.tree.map(jnp.copy, state), before the step"
)


def was_donated(state: Any) -> bool:
    """Whether an array of a state is gone."""
    arrays = (x for x in jax.tree.leaves(state) if isinstance(x, jax.Array))
    return any(not isinstance(x, Tracer) and x.is_deleted() for x in arrays)


class Donating:
    """`jax.jit(function, donate_argnums=0)` for a function of a `TrainState` and a batch.

    The function returns a new state first. Where the state lies on several devices, the new one lies
    as it did: left to itself, XLA would place it by what produced it, and the next call would
    compile for that. A call with a state that an earlier call took raises a ValueError that says
    what to do. Everything else that a jitted function has is there, too (`lower`, `trace`, ...).
    """

    def __init__(self, function: Callable[[Any, Any], Any]):
        self._function = function
        self._jitted: Any = jax.jit(function, donate_argnums=0)
        self._placed: dict[Any, Any] = {}  # the same with output shardings, by these
        functools.update_wrapper(self, function)

    def __call__(self, state: Any, batch: Any) -> Any:
        try:
            return self._for(state)(state, batch)
        except (RuntimeError, ValueError) as error:
            # By its words: a step that fails while it runs has donated its state, too.
            if "has been deleted" in str(error) and was_donated(state):
                raise ValueError(DONATED) from error
            raise

    def _for(self, state: Any) -> Any:
        """The jitted function that leaves a state where it lies."""
        step = getattr(state, "step", None)  # on every device that the state is on
        sharding = None if isinstance(step, Tracer) else getattr(step, "sharding", None)
        if sharding is None or len(sharding.device_set) == 1:
            return self._jitted
        leaves, tree = jax.tree.flatten(state)
        shardings = tuple(x.sharding for x in leaves)
        found = self._placed.get((tree, shardings))
        if found is None:
            places = (tree.unflatten(shardings), None)
            found = jax.jit(self._function, donate_argnums=0, out_shardings=places)
            self._placed[tree, shardings] = found
        return found

    def lower(self, state: Any, batch: Any) -> jax.stages.Lowered:
        return self._for(state).lower(state, batch)

    def trace(self, state: Any, batch: Any) -> jax.stages.Traced:
        return self._for(state).trace(state, batch)

    def _cache_size(self) -> int:
        return sum(jitted._cache_size() for jitted in (self._jitted, *self._placed.values()))

    def __getattr__(self, name: str) -> Any:
        if name == "_jitted":  # of an object that a copy has not filled yet
            raise AttributeError(name)
        return getattr(self._jitted, name)
