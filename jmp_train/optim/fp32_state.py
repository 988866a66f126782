"""An optimizer that keeps its state in float32 over parameters of any dtype."""

from __future__ import annotations

from typing import Any

import optax

from jmp_train.optim.narrow_parameters import NarrowParameters
from jmp_train.tree import widen_to_full


def fp32_state(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Runs an optimizer on float32 copies of 16-bit parameters and gradients.

    Optax makes its state like the parameters: `optax.adam` over bfloat16 parameters keeps both
    moments in bfloat16, where an exponential average with b2 = 0.999 stops moving (1 - 0.999 is
    below half a unit in the last place, 2^-9), and over float16 ones the epsilon of 1e-8 is 0.
    Here `init` and `update` see float32 (or float64 for float64) in place of every narrower
    floating leaf, so state and updates are float32; `optax.apply_updates` then adds in float32 and
    rounds the sum once to the parameter's dtype. Over float32 parameters this is the optimizer
    itself, at no cost. A dtype that the optimizer itself was told to use (`mu_dtype`) is kept.

    The rounding of the sum still loses updates smaller than half a unit in the last place of a
    16-bit parameter. Keep parameters in float32 (`mixed_bfloat16`, `mixed_float16`) to avoid it,
    or use one of `master_weights`, `bf16_remainder`, `stochastic_rounding` and `kahan`.

    Args:
      optimizer: any Optax transformation. One of those four comes back as it is: it widens what its
        own inner optimizer sees.

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

    def init(params: Any) -> Any:
        return inner.init(widen_to_full(params))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        params = None if params is None else widen_to_full(params)
        return inner.update(widen_to_full(updates), state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)
