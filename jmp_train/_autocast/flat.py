"""A call of a function of any pytrees, as a function of its arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import source_info_util

from jmp_train._jaxpr.compat import Operand
from jmp_train.types import Function

# The line that an equation was written in is one of the function.
source_info_util.register_exclusion(__file__)


@dataclasses.dataclass
class FlatCall:
    """A function of the arrays of a call; the other arguments, and the other results, are stored.

    Attributes:
      fn: the function.
      leaves: those of its arguments, None in the places of arrays.
      where: the places of the arrays.
      tree: the structure of its arguments and of the values of its keywords.
      names: its keywords.
      is_result: whether a leaf of the results is an array that a call returns.
      results: the leaves of the last call's results, None in the places of arrays.
      places: the places of those arrays.
      results_tree: the structure of the results.
    """

    fn: Function
    leaves: list[Any]
    where: list[int]
    tree: Any
    names: tuple[str, ...]
    is_result: Callable[[Any], bool]
    results: list[Any] = dataclasses.field(default_factory=list)
    places: list[int] = dataclasses.field(default_factory=list)
    results_tree: Any = None

    @property
    def name(self) -> str:
        return getattr(self.fn, "__name__", type(self.fn).__name__)

    def __call__(self, *arrays: Operand) -> list[Operand]:
        """Return the arrays of the results, and store the others."""
        outs, self.results_tree = jax.tree.flatten(self.run(self.leaves, arrays))
        self.places = [i for i, out in enumerate(outs) if self.is_result(out)]
        found = [outs[i] for i in self.places]
        for i in self.places:  # no tracer outlives its trace
            outs[i] = None
        self.results = outs
        return found

    def run(self, leaves: Sequence[Any], arrays: Sequence[Operand]) -> Any:
        """Return what the function returns for other leaves and arrays, and store nothing."""
        full = list(leaves)
        for i, array in zip(self.where, arrays, strict=True):
            full[i] = array
        args, values = jax.tree.unflatten(self.tree, full)
        return self.fn(*args, **dict(zip(self.names, values, strict=True)))

    def rebuild(self, arrays: Sequence[Operand]) -> Any:
        """Return the results of the function, with the arrays of a call."""
        full = list(self.results)
        for i, array in zip(self.places, arrays, strict=True):
            full[i] = array
        return jax.tree.unflatten(self.results_tree, full)


def flat_call(
    fn: Function,
    args: Any,
    kwargs: dict[str, Any],
    is_array: Callable[[Any], bool],
    is_result: Callable[[Any], bool],
) -> tuple[FlatCall, list[Operand]]:
    """Return a call as a function of its arrays, and the arrays, which it does not keep."""
    leaves, tree = jax.tree.flatten((args, tuple(kwargs.values())))
    where = [i for i, leaf in enumerate(leaves) if is_array(leaf)]
    arrays = [leaves[i] for i in where]
    for i in where:
        leaves[i] = None
    return FlatCall(fn, leaves, where, tree, tuple(kwargs), is_result), arrays


def is_array(leaf: Any) -> bool:
    """Return whether JAX has arrays like a leaf of arguments; plain numbers are none."""
    if isinstance(leaf, (np.ndarray, np.generic)):
        if leaf.dtype.kind == "T":  # JAX has types of texts of variable length, but no operations
            return False
        try:
            jax.typeof(leaf)
        except TypeError:  # JAX has no arrays of objects, texts and dates
            return False
        return True
    return isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct))
