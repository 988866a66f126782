"""Scatters in other dtypes than they were traced in."""

from __future__ import annotations

from collections.abc import Callable

from jax import lax

from jmp_train._jaxpr import compat
from jmp_train._jaxpr.compat import Equation, Operand

SCATTERS = {
    "scatter": lax.scatter,
    "scatter-add": lax.scatter_add,
    "scatter-max": lax.scatter_max,
    "scatter-min": lax.scatter_min,
    "scatter-mul": lax.scatter_mul,
    "scatter-sub": lax.scatter_sub,
}


def scatter(
    eqn: Equation,
    operand: Operand,
    indices: Operand,
    updates: Operand,
    function: Callable[[Operand], Operand] | None = None,
) -> Operand:
    """Scatter in another dtype: the equation's parameters have a computation in the traced one.

    Args:
      eqn: the equation.
      operand: its operands.
      indices:
      updates:
      function: replaces the function of `x.at[i].apply(function)`, which runs in the dtype that it
        was traced in.
    """
    names = ("indices_are_sorted", "unique_indices", "mode")
    options = {name: eqn.params[name] for name in names}
    dimensions = eqn.params["dimension_numbers"]
    if applies_function(eqn):
        function = function or _function_of(eqn)
        shape = updates.shape
        return lax.scatter_apply(
            operand, indices, function, dimensions, update_shape=shape, **options
        )
    return SCATTERS[eqn.primitive.name](operand, indices, updates, dimensions, **options)


def applies_function(eqn: Equation) -> bool:
    """Return whether a scatter is that of `x.at[i].apply(function)`."""
    return eqn.primitive.name == "scatter" and eqn.params["update_jaxpr"] is not None


def _function_of(eqn: Equation) -> Callable[[Operand], Operand]:
    """Return the function that a scatter applies; it runs in the dtype that it was traced in."""
    dtype = eqn.invars[0].aval.dtype
    jaxpr, consts = eqn.params["update_jaxpr"], eqn.params["update_consts"]

    def function(x: Operand) -> Operand:
        unused = lax.full((), 0, dtype)
        return compat.eval_jaxpr(jaxpr, consts, x.astype(dtype), unused)[0].astype(x.dtype)

    return function
