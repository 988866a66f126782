"""Uses of a parameter whose gradient is summed over the devices in a dtype of choice.

The compiler sums where the gradient is made: at the product of activations and their gradients, in the
dtype of its result. So the product gets the dtype that is asked for.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from jmp_train._jaxpr import compat
from jmp_train._jaxpr.compat import Equation
from jmp_train._jaxpr.walk import walk
from jmp_train.sharding.shares import gather_values, scatter_gradient

_PRODUCTS = frozenset({"dot_general", "conv_general_dilated"})
USES = _PRODUCTS | {"broadcast_in_dim", "gather"}
"""Primitives that sum the gradient of an operand over examples."""


def use(eqn: Equation, operands: list[Any], index: int) -> Any:
    """Return the result of an equation whose operand with an index is a share; None where nothing is
    asked for.

    The gradient of the operand is computed in the reduce dtype, as the result of a product of
    activations in their dtype.
    """
    share = operands[index]
    if share.reduce_dtype is None or share.reduce_dtype == share.dtype:
        return None
    if not jax.numpy.issubdtype(share.dtype, jax.numpy.floating):
        return None
    places = share.places

    def apply(whole: Any, others: Any) -> Any:
        return compat.bind(eqn.primitive, [*others[:index], whole, *others[index:]], eqn.params)[0]

    @jax.custom_vjp
    def run(x: Any, others: Any) -> Any:
        return apply(gather_values(x, places, share.dtype), others)

    def forward(x: Any, others: Any) -> Any:
        whole = gather_values(x, places, share.dtype)
        return apply(whole, others), (whole, others)

    def backward(residuals: Any, g: Any) -> Any:
        whole, others = residuals
        rest = [i for i, x in enumerate(others) if jax.numpy.issubdtype(x.dtype, jax.numpy.inexact)]

        def of_others(*some: Any) -> Any:
            full = list(others)
            for i, x in zip(rest, some, strict=True):
                full[i] = x
            return apply(whole, full)

        given = jax.vjp(of_others, *(others[i] for i in rest))[1](g) if rest else ()
        grads: list[Any] = [
            None if i in rest else np.zeros(x.shape, jax.dtypes.float0)
            for i, x in enumerate(others)
        ]
        for i, x in zip(rest, given, strict=True):
            grads[i] = x
        own = _gradient(eqn, functools.partial(apply, others=others), whole, g, share.reduce_dtype)
        own = scatter_gradient(own, places)
        return own.astype(share.array.dtype), grads

    run.defvjp(forward, backward)
    return run(share.array, [x for i, x in enumerate(operands) if i != index])


def _gradient(eqn: Equation, apply: Any, whole: Any, g: Any, dtype: np.dtype) -> Any:
    """Return the gradient of a linear function at its operand, in a dtype."""
    if eqn.primitive.name not in _PRODUCTS:  # a sum alone
        return jax.linear_transpose(apply, jax.ShapeDtypeStruct(whole.shape, dtype))(
            g.astype(dtype)
        )[0]
    if eqn.primitive.name == "conv_general_dilated" and dtype.itemsize < whole.dtype.itemsize:
        # JAX has no convolution whose result is narrower than its operands.
        return jax.vjp(apply, whole)[1](g)[0].astype(dtype)
    transposed = jax.linear_transpose(apply, jax.ShapeDtypeStruct(whole.shape, whole.dtype))
    closed = jax.make_jaxpr(lambda g: transposed(g)[0])(g)

    def equation(_: int, inner: Equation, operands: list[Any]) -> Any:
        params = dict(inner.params)
        if inner.primitive.name in _PRODUCTS:
            params["preferred_element_type"] = np.dtype(dtype)
        elif inner.primitive.name == "convert_element_type":
            return operands
        return compat.bind(inner.primitive, operands, params)

    body = compat.body_of(closed)
    env = walk(body, [g], equation, constant=lambda _, x: x, literal=lambda x: x.val)
    (out,) = env.read_all(body.outvars)
    return out.astype(dtype)
