"""Reading jaxprs: which operations run in which dtypes."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np

from jmp_train._jaxpr.equations import placed_equations

PRODUCTS = ("dot_general", "conv_general_dilated")


def equations(jaxpr):
    """Yield every equation of a jaxpr, those of its bodies included."""
    return (eqn for eqn, _ in placed_equations(jaxpr))


def operand_dtypes(fn, primitive, *args):
    """Return the dtypes of the floating operands of each equation of a primitive."""
    found = []
    for eqn in equations(jax.make_jaxpr(fn)(*args)):
        if eqn.primitive.name == primitive:
            floats = [a.aval.dtype for a in eqn.invars if jnp.issubdtype(a.aval.dtype, np.floating)]
            found.append({d.name for d in floats})
    return found


def result_dtypes(jaxpr, *primitives):
    """Count the results of the named primitives (products, where none is named) by dtype."""
    names = primitives or PRODUCTS
    return Counter(
        str(eqn.outvars[0].aval.dtype) for eqn in equations(jaxpr) if eqn.primitive.name in names
    )


def product_dtypes(fn, *args):
    """Return the result dtypes of a function's matrix products."""
    return set(result_dtypes(jax.make_jaxpr(fn)(*args), "dot_general"))


def casts(fn, *args, dtype="bfloat16", shape=None):
    """Count the equations that convert an array (of a shape) to a dtype."""
    eqns = equations(jax.make_jaxpr(fn)(*args))
    return sum(
        e.primitive.name == "convert_element_type"
        and e.params["new_dtype"] == dtype
        and e.invars[0].aval.ndim > 0
        and (shape is None or e.invars[0].aval.shape == shape)
        for e in eqns
    )
