"""Narrow parameters that are rounded up or down at random, with only a key in the state."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jmp_train.numerics.rounding import add_float32, stochastic_round, to_float32
from jmp_train.optim.fp32_state import fp32_state
from jmp_train.optim.narrow_parameters import NarrowParameters, map_narrow, narrow_transformation
from jmp_train.types import PyTree


class StochasticRoundingState(NamedTuple):
    """State of `stochastic_rounding`."""

    inner: PyTree  # state of the inner optimizer, float32
    key: jax.Array  # PRNG key of the next update, as raw data: shape=(2,), uint32, for threefry


def stochastic_rounding(optimizer: optax.GradientTransformation, key: Any = 0) -> NarrowParameters:
    """Run an optimizer on narrow parameters and round each new parameter without bias.

    The update is added in float32. The sum is rounded to one of its two neighbours in the
    parameter's dtype, the nearer one with the higher probability. Updates below half of the spacing
    therefore move the parameter in the mean, where rounding to nearest loses them. The cost is
    noise of up to one spacing a step.

    The state takes no bytes per parameter, only a key. A narrow parameter whose update is zero
    stays unchanged, subnormal ones included (-0 becomes +0). The inner optimizer updates float32
    parameters directly.

    Args:
      optimizer: any Optax transformation, gradient clipping included. Its state is float32.
      key: PRNG key, typed or raw, or an integer seed. The state has the key of the next update, so
        a resumed or repeated run draws the same numbers, and a skipped step draws none.

    Returns:
      A transformation whose `update` needs `params`. Its updates for narrow parameters are
      `BitUpdate`s, which `optax.apply_updates` adds exactly.

    Raises:
      ValueError: from `init`, if no parameter is bfloat16, float16, float8_e4m3fn or float8_e5m2,
        or one has another narrow dtype.

    >>> params = {"w": jnp.ones(2000, jnp.bfloat16)}
    >>> optimizer = stochastic_rounding(optax.sgd(1.0), key=0)
    >>> state = optimizer.init(params)
    >>> for _ in range(8):
    ...     grads = {"w": jnp.full(2000, 0.001)}  # 1 - 0.001 is 1 in bfloat16
    ...     updates, state = optimizer.update(grads, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> round(float(params["w"].astype(jnp.float32).mean()), 3)
    0.992

    Source: Gupta et al. 2015, "Deep Learning with Limited Numerical Precision"; Zamirai et al.
    2020, "Revisiting BFloat16 Training", algorithm 2.
    """
    start = jax.random.key(key) if isinstance(key, int) else jnp.asarray(key)
    typed = jnp.issubdtype(start.dtype, jax.dtypes.prng_key)
    start = start if typed else jax.random.wrap_key_data(start)
    implementation = jax.random.key_impl(start)

    def first(params: PyTree, values: PyTree) -> jax.Array:
        del params, values
        return jax.random.key_data(start)

    def move(params: PyTree, data: Any, values: PyTree, updates: PyTree) -> tuple[PyTree, PyTree]:
        now = jax.random.wrap_key_data(data, impl=implementation)
        following, now = jax.random.split(now)
        leaves, treedef = jax.tree.flatten(params)
        keys = treedef.unflatten([jax.random.fold_in(now, n) for n in range(len(leaves))])

        def rounded(p: PyTree, value: jax.Array, u: PyTree, key: jax.Array) -> jax.Array:
            return stochastic_round(add_float32(value, to_float32(u)), p.dtype, key)

        new = map_narrow(rounded, params, values, updates, keys)
        return new, jax.random.key_data(following)

    return narrow_transformation(
        "stochastic_rounding",
        fp32_state(optimizer),
        StochasticRoundingState,
        first=first,
        move=move,
    )
