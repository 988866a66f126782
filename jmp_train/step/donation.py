"""A jitted step that donates its state and keeps the placement of the state on devices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jmp_train.types import PyTree

DONATED = (
    "this state was donated to an earlier step, which reused its memory; expected the state that "
    "the last step returned: state, info = stepper.step(state, batch); to keep a copy, call "
    "jax.tree.map(jnp.copy, state) before the step"
)


def was_donated(state: PyTree) -> bool:
    """Return whether an array of a state was donated, and so deleted."""
    arrays = (x for x in jax.tree.leaves(state) if isinstance(x, jax.Array))
    return any(not isinstance(x, Tracer) and x.is_deleted() for x in arrays)


class Donating:
    """`jax.jit(function, donate_argnums=0)` for a function of a `TrainState` and a batch.

    The first result of the function is the new state. On several devices, the new state has the
    sharding of the old one. Without that constraint, XLA could choose another sharding, and the
    next call would be compiled again. The other attributes of a jitted function (`lower`, `trace`,
    ...) are available too.

    Raises:
      ValueError: when called with a state that was donated to an earlier call.
    """

    def __init__(self, function: Callable[[Any, PyTree], Any]):
        self._function = function
        self._jitted: Any = jax.jit(function, donate_argnums=0)
        self._placed: dict[Any, Any] = {}  # jitted functions by output shardings
        functools.update_wrapper(self, function)

    def __call__(self, state: PyTree, batch: PyTree) -> PyTree:
        try:
            return self._for(state)(state, batch)
        except (RuntimeError, ValueError) as error:
            # The message decides: a step that fails while it runs has also donated its state.
            if "has been deleted" in str(error) and was_donated(state):
                raise ValueError(DONATED) from error
            raise

    def _for(self, state: PyTree) -> PyTree:
        """Return the jitted function whose new state has the sharding of `state`."""
        step = getattr(state, "step", None)  # replicated on every device of the state
        sharding = None if isinstance(step, Tracer) else getattr(step, "sharding", None)
        if sharding is None or len(sharding.device_set) == 1:
            return self._jitted
        leaves, tree = jax.tree.flatten(state)
        shardings = tuple(x.sharding for x in leaves)
        found = self._placed.get((tree, shardings))
        if found is None:
            # Results that every process reads are whole on each device.
            mesh = getattr(sharding, "mesh", None)
            info = (
                NamedSharding(mesh, P()) if mesh is not None and jax.process_count() > 1 else None
            )
            places = (tree.unflatten(shardings), info)
            found = jax.jit(self._function, donate_argnums=0, out_shardings=places)
            self._placed[tree, shardings] = found
        return found

    def lower(self, state: PyTree, batch: PyTree) -> jax.stages.Lowered:
        return self._for(state).lower(state, batch)

    def trace(self, state: PyTree, batch: PyTree) -> jax.stages.Traced:
        return self._for(state).trace(state, batch)

    def _cache_size(self) -> int:
        return sum(jitted._cache_size() for jitted in (self._jitted, *self._placed.values()))

    def __getattr__(self, name: str) -> PyTree:
        if name == "_jitted":  # `copy` asks before it sets attributes: avoid infinite recursion
            raise AttributeError(name)
        return getattr(self._jitted, name)
