"""Floating-point operations of a jaxpr, counted by hand."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

OTHER = "other"
"""What `flops_by_dtype` counts beside products."""


def count_flops(jaxpr: Any) -> float:
    """Return the floating-point operations of a jaxpr: products, and one for each other element.

    The body of a scan counts once for each iteration, unlike in XLA's cost analysis; the body of a
    `while` loop counts once.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> count_flops(jax.make_jaxpr(jnp.dot)(jnp.ones((2, 3)), jnp.ones((3, 5))).jaxpr)
    60.0
    """
    return sum(flops_by_dtype(jaxpr).values())


def flops_by_dtype(jaxpr: Any) -> Counter[str]:
    """Return the operations of products and convolutions by the dtype of their operands, and, as
    `OTHER`, one for each element of any other result.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> x = jnp.ones((2, 2), jnp.bfloat16)
    >>> dict(flops_by_dtype(jax.make_jaxpr(lambda x: x @ x + 1)(x).jaxpr))
    {'bfloat16': 16.0, 'other': 4.0}
    """
    total: Any = Counter()  # of floats
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        size = float(sum(math.prod(getattr(v.aval, "shape", ())) for v in equation.outvars))
        inner = [flops_by_dtype(body) for body in inner_jaxprs(params)]
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total[_dtype(equation)] += 2 * size * math.prod(shape[d] for d in contracted)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            features = kernel[params["dimension_numbers"].rhs_spec[0]]
            total[_dtype(equation)] += 2 * size * math.prod(kernel) / features
        elif name == "cond":
            total += max(inner, key=lambda counts: sum(counts.values()))
        elif inner:
            times = params["length"] if name == "scan" else 1
            for counts in inner:
                for dtype, count in counts.items():
                    total[dtype] += count * times
        else:
            total[OTHER] += size
    return total


def _dtype(equation: Any) -> str:
    """Return the widest dtype of the operands."""
    dtypes = [v.aval.dtype for v in equation.invars]
    return str(max(dtypes, key=lambda dtype: dtype.itemsize))


def inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    """Yield the jaxprs in the parameters of an equation."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            body = getattr(item, "jaxpr", item)  # of a closed jaxpr
            if hasattr(body, "eqns"):
                yield body
