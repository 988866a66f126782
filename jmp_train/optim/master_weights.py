"""Narrow parameters with a float32 copy of them in the optimizer's state."""

from __future__ import annotations

from typing import NamedTuple

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
from jmp_train.optim.narrow_parameters import NarrowParameters, map_narrow, narrow_transformation
from jmp_train.types import DTypeLike, PyTree


class MasterWeightsState(NamedTuple):
    """State of `master_weights`."""

    inner: PyTree  # state of the inner optimizer, float32
    master: PyTree  # like the parameters, float32; None for a float32 parameter


def master_weights(optimizer: optax.GradientTransformation) -> NarrowParameters:
    """Run an optimizer on a float32 copy of narrow parameters and round the copy to their dtype.

    The copy starts equal to the parameters. Each update is added to the copy in float32, and the
    parameter becomes the nearest value of its dtype. Ties are rounded to even, except in bfloat16,
    where they are rounded away from zero. `bf16_remainder`, which cannot represent ties to even,
    therefore gives the same numbers bit for bit.

    If other code writes to a parameter, the next update overwrites it. The state takes 4 bytes a
    parameter. The inner optimizer updates float32 parameters directly.

    Args:
      optimizer: any Optax transformation, gradient clipping included. Its state is float32.

    Returns:
      A transformation whose `update` needs `params`. Its updates for narrow parameters are
      `BitUpdate`s, which `optax.apply_updates` adds exactly.

    Raises:
      ValueError: from `init`, if no parameter is bfloat16, float16, float8_e4m3fn or float8_e5m2,
        or one has another narrow dtype.

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

    def first(params: PyTree, values: PyTree) -> PyTree:
        del params
        return values

    def read(params: PyTree, master: PyTree) -> PyTree:
        del params
        return master

    def move(
        params: PyTree, master: PyTree, values: PyTree, updates: PyTree
    ) -> tuple[PyTree, PyTree]:
        del values
        master = map_narrow(lambda p, m, u: add_float32(m, to_float32(u)), params, master, updates)
        return map_narrow(lambda p, m: _nearest(m, p.dtype), params, master), master

    return narrow_transformation(
        "master_weights",
        fp32_state(optimizer),
        MasterWeightsState,
        first=first,
        move=move,
        read=read,
    )


def _nearest(master: jax.Array, dtype: DTypeLike) -> jax.Array:
    if dtype == jnp.bfloat16:
        return split_bf16_remainder(master)[0]
    return round_to_nearest(master, dtype)
