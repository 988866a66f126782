"""Narrow parameters with a float32 copy of them in the optimizer's state."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jmp_train.numerics.rounding import (
    add_float32,
    round_to_nearest,
    split_bf16_remainder,
    to_float32,
)
from jmp_train.optim.fp32_state import fp32_state
from jmp_train.optim.narrow_parameters import (
    NarrowParameters,
    bit_updates,
    check_narrow,
    in_full,
    map_narrow,
)


class MasterWeightsState(NamedTuple):
    """The state of `master_weights`."""

    inner: Any  # of the inner optimizer, float32
    master: Any  # like the parameters, float32; None for one that is float32 itself


def master_weights(optimizer: optax.GradientTransformation) -> NarrowParameters:
    """Runs an optimizer on a float32 copy of narrow parameters; these are the copy, rounded.

    The copy starts as the parameters and from then on is the truth: an update is added to it in
    float32, and the parameter becomes the nearest value of its dtype. Ties go to even, except in
    bfloat16, where they go away from zero so that `bf16_remainder`, which has no room for ties to
    even, gives the same numbers bit for bit. What is written to the parameters from outside is
    overwritten at the next update.

    4 bytes a parameter in the state, 6 with a 16-bit parameter. A parameter in float32 is left to
    the inner optimizer.

    Args:
      optimizer: any Optax transformation, clipping and the like inside it. Its state is float32.

    Returns:
      A transformation whose `update` wants `params`. Its updates for narrow parameters are
      `BitUpdate`s, which `optax.apply_updates` adds exactly.

    Raises:
      ValueError: from `init`, if no parameter is bfloat16, float16, float8_e4m3fn or float8_e5m2,
        or one is in another narrow dtype.

    >>> params = {"w": jnp.ones(2, jnp.bfloat16)}
    >>> optimizer = master_weights(optax.sgd(1.0))
    >>> state = optimizer.init(params)
    >>> for _ in range(8):
    ...     grads = {"w": jnp.full(2, 0.001)}  # 1 - 0.001 is 1 in bfloat16
    ...     updates, state = optimizer.update(grads, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> params["w"], state.master["w"]
    (Array([0.992188, 0.992188], dtype=bfloat16), Array([0.9920001, 0.9920001], dtype=float32))

    Source: Micikevicius et al. 2018, "Mixed Precision Training", section 3.1.
    """
    inner = fp32_state(optimizer)

    def init(params: Any) -> MasterWeightsState:
        check_narrow("master_weights", params)
        master = map_narrow(to_float32, params)
        return MasterWeightsState(inner.init(in_full(params, master)), master)

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, MasterWeightsState]:
        full = in_full(params, state.master)
        updates, inner_state = inner.update(updates, state.inner, full, **extra_args)
        master = map_narrow(
            lambda p, m, u: add_float32(m, to_float32(u)), params, state.master, updates
        )
        new = map_narrow(lambda p, m: _nearest(m, p.dtype), params, master)
        return bit_updates(updates, params, new), MasterWeightsState(inner_state, master)

    return NarrowParameters(init, update)


def _nearest(master: jax.Array, dtype: Any) -> jax.Array:
    if dtype == jnp.bfloat16:
        return split_bf16_remainder(master)[0]
    return round_to_nearest(master, dtype)
