"""Narrow parameters whose updates are rounded up or down by chance, with nothing kept."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jmp_train.numerics.rounding import add_float32, stochastic_round, to_float32
from jmp_train.optim.fp32_state import fp32_state
from jmp_train.optim.narrow_parameters import (
    NarrowParameters,
    bit_updates,
    check_narrow,
    in_full,
    map_narrow,
)


class StochasticRoundingState(NamedTuple):
    """The state of `stochastic_rounding`."""

    inner: Any  # of the inner optimizer, float32
    key: jax.Array  # the next update's PRNG key, as raw data: shape=(2,), uint32, for threefry


def stochastic_rounding(optimizer: optax.GradientTransformation, key: Any = 0) -> NarrowParameters:
    """Runs an optimizer on narrow parameters and rounds each new one without bias.

    The update is added in float32; the sum goes to either neighbour in the parameter's dtype, the
    nearer the likelier, so that updates below half a spacing move the parameter in the mean where
    rounding to nearest never would. The price is noise of up to one spacing a step; nothing is
    kept but a key. A narrow parameter whose update is zero stays as it is (-0 becomes +0), a subnormal one
    too.

    0 bytes a parameter in the state. A parameter in float32 is left to the inner optimizer.

    Args:
      optimizer: any Optax transformation, clipping and the like inside it. Its state is float32.
      key: a PRNG key, typed or raw, or an integer seed; the state carries it on, so a run that is
        resumed, or repeated, draws the same numbers, and a skipped step draws none.

    Returns:
      A transformation whose `update` wants `params`. Its updates for narrow parameters are
      `BitUpdate`s, which `optax.apply_updates` adds exactly.

    Raises:
      ValueError: from `init`, if no parameter is bfloat16, float16, float8_e4m3fn or float8_e5m2,
        or one is in another narrow dtype.

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
    inner = fp32_state(optimizer)
    first = jax.random.key(key) if isinstance(key, int) else jnp.asarray(key)
    typed = jnp.issubdtype(first.dtype, jax.dtypes.prng_key)
    first = first if typed else jax.random.wrap_key_data(first)
    implementation = jax.random.key_impl(first)

    def init(params: Any) -> StochasticRoundingState:
        check_narrow("stochastic_rounding", params)
        return StochasticRoundingState(inner.init(in_full(params)), jax.random.key_data(first))

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, StochasticRoundingState]:
        full = in_full(params)
        updates, inner_state = inner.update(updates, state.inner, full, **extra_args)
        now = jax.random.wrap_key_data(state.key, impl=implementation)
        following, now = jax.random.split(now)
        leaves, treedef = jax.tree.flatten(params)
        keys = treedef.unflatten([jax.random.fold_in(now, n) for n in range(len(leaves))])

        def rounded(p: Any, value: jax.Array, u: Any, key: jax.Array) -> jax.Array:
            return stochastic_round(add_float32(value, to_float32(u)), p.dtype, key)

        new = map_narrow(rounded, params, full, updates, keys)
        state = StochasticRoundingState(inner_state, jax.random.key_data(following))
        return bit_updates(updates, params, new), state

    return NarrowParameters(init, update)
