"""A function of any pytrees as a jaxpr of its arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from jmp_train._autocast.flat import flat_call, is_array
from jmp_train._autocast.kinds import kind_of_input
from jmp_train._autocast.planner import Planner
from jmp_train._autocast.plans import Plan
from jmp_train._jaxpr import compat
from jmp_train._jaxpr.compat import Operand
from jmp_train.types import Function


class TracedFunction:
    """A function traced to a jaxpr of its arrays; its other arguments and results are stored."""

    def __init__(self, fn: Function, args: Any, kwargs: Any):
        is_result = lambda leaf: isinstance(leaf, jax.Array)
        self._call, self.arrays = flat_call(fn, args, kwargs, is_array, is_result)
        flat = lambda *arrays: self._call(*arrays)
        self.closed = compat.trace(flat, self.arrays, self._call.name)
        self.kinds = [kind_of_input(v.aval) for v in compat.body_of(self.closed).invars]

    def plan(self, planner: Planner) -> Plan:
        """Return its plan; the results keep their dtypes."""
        return planner.plan(self.closed, self.kinds, fixed_outputs=len(self._call.places))

    def rebuild(self, arrays: Sequence[Operand]) -> Any:
        """Return the results of the function, with other arrays."""
        return self._call.rebuild(arrays)
