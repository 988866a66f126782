"""A function of any pytrees as a jaxpr of its arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jmp_train._autocast.kinds import kind_of_input
from jmp_train._autocast.planner import Planner
from jmp_train._autocast.plans import Plan
from jmp_train._jaxpr import compat
from jmp_train._jaxpr.compat import Operand
from jmp_train.types import Function


class TracedFunction:
    """A function traced to a jaxpr of its arrays; its other arguments and results are stored."""

    def __init__(self, fn: Function, args: Any, kwargs: Any):
        leaves, tree = jax.tree.flatten((args, kwargs))
        where = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]
        self.arrays = [leaves[i] for i in where]
        self._outs: list[Operand] = []
        self._places: list[int] = []
        self._tree: Any = None

        def flat(*arrays: Any) -> Any:
            full = list(leaves)
            for i, array in zip(where, arrays, strict=True):
                full[i] = array
            args, kwargs = jax.tree.unflatten(tree, full)
            outs, self._tree = jax.tree.flatten(fn(*args, **kwargs))
            self._places = [i for i, out in enumerate(outs) if isinstance(out, jax.Array)]
            traced = [outs[i] for i in self._places]
            for i in self._places:  # no tracer outlives its trace
                outs[i] = None
            self._outs = outs
            return traced

        name = getattr(fn, "__name__", type(fn).__name__)
        self.closed = compat.trace(flat, self.arrays, name)
        self.kinds = [kind_of_input(v.aval) for v in compat.body_of(self.closed).invars]

    def plan(self, planner: Planner) -> Plan:
        """Return its plan; the results keep their dtypes."""
        return planner.plan(self.closed, self.kinds, fixed_outputs=len(self._places))

    def rebuild(self, arrays: Sequence[Operand]) -> Any:
        """Return the results of the function, with other arrays."""
        full = list(self._outs)
        for i, array in zip(self._places, arrays, strict=True):
            full[i] = array
        return jax.tree.unflatten(self._tree, full)


def _is_array(leaf: Any) -> bool:
    if isinstance(leaf, (np.ndarray, np.generic)):
        if leaf.dtype.kind == "T":  # JAX has types of texts of variable length, but no operations
            return False
        try:
            jax.typeof(leaf)
        except TypeError:  # JAX has no arrays of objects, texts and dates
            return False
        return True
    return isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct))
