"""Float32 optimizer state for parameters of any dtype."""

from __future__ import annotations

from typing import Any

import optax

from jmp_train.optim.narrow_parameters import NarrowParameters
from jmp_train.tree import widen_to_full
from jmp_train.types import PyTree


def fp32_state(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Run an optimizer on float32 copies of 16-bit parameters and gradients.

    Optax makes its state in the dtype of the parameters. `optax.adam` keeps both moments of
    bfloat16 parameters in bfloat16, where an exponential average with b2 = 0.999 stops moving,
    because 1 - 0.999 is below half a unit in the last place, 2^-9. In float16 its epsilon of 1e-8
    is 0.

    This transformation casts every floating leaf narrower than float32 to float32 before `init` and
    `update`, so state and updates are float32. `optax.apply_updates` then adds in float32 and
    rounds the sum once to the parameter's dtype. With float32 parameters the transformation does
    nothing and costs nothing. A dtype given to the optimizer (`mu_dtype`) still applies.

    Rounding the sum loses updates below half a unit in the last place of a 16-bit parameter. To
    avoid that, store parameters in float32 (`mixed_bfloat16`, `mixed_float16`) or use
    `master_weights`, `bf16_remainder`, `stochastic_rounding` or `kahan`.

    Args:
      optimizer: any Optax transformation. One of those four is returned unchanged, because it
        widens what its inner optimizer sees.

    Returns:
      A transformation with the same arguments.

    >>> import jax.numpy as jnp
    >>> params = {"w": jnp.ones(2, jnp.bfloat16)}
    >>> optax.adam(0.1).init(params)[0].mu["w"].dtype
    dtype(bfloat16)
    >>> fp32_state(optax.adam(0.1)).init(params)[0].mu["w"].dtype
    dtype('float32')

    Source: Micikevicius et al. 2018, "Mixed Precision Training", section 3.1; Kingma & Ba 2015,
    "Adam", algorithm 1.
    """
    if isinstance(optimizer, NarrowParameters):
        return optimizer
    inner = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> PyTree:
        return inner.init(widen_to_full(params))

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: Any) -> PyTree:
        params = None if params is None else widen_to_full(params)
        return inner.update(widen_to_full(updates), state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)
