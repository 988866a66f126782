"""Scatters in other dtypes than they were traced in."""

from __future__ import annotations

from jax import lax

from jmp_train._jaxpr.compat import Equation, Operand

SCATTERS = {
    "scatter": lax.scatter,
    "scatter-add": lax.scatter_add,
    "scatter-max": lax.scatter_max,
    "scatter-min": lax.scatter_min,
    "scatter-mul": lax.scatter_mul,
    "scatter-sub": lax.scatter_sub,
}


def scatter(eqn: Equation, operand: Operand, indices: Operand, updates: Operand) -> Operand:
    """Scatter in another dtype: the equation's parameters have a computation in the traced one."""
    names = ("indices_are_sorted", "unique_indices", "mode")
    return SCATTERS[eqn.primitive.name](
        operand,
        indices,
        updates,
        eqn.params["dimension_numbers"],
        **{name: eqn.params[name] for name in names},
    )
