"""bfloat16 parameters with the low 16 bits of their float32 values in the optimizer's state."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from jmp_train.numerics.rounding import (
    add_float32,
    join_bf16_remainder,
    split_bf16_remainder,
    to_float32,
)
from jmp_train.optim.fp32_state import fp32_state
from jmp_train.optim.narrow_parameters import (
    NarrowParameters,
    map_narrow,
    narrow_transformation,
    unzip_narrow,
)
from jmp_train.types import PyTree


class Bf16RemainderState(NamedTuple):
    """State of `bf16_remainder`."""

    inner: PyTree  # state of the inner optimizer, float32
    remainder: PyTree  # like the parameters, uint16; None for a float32 parameter


def bf16_remainder(optimizer: optax.GradientTransformation) -> NarrowParameters:
    """Run an optimizer on float32 parameters that are stored as bfloat16 and a 16-bit remainder.

    The model computes with the bfloat16 parameter, which is the nearest one to the float32 value.
    The remainder in the state takes 2 bytes a parameter, where `master_weights` takes 4. Given
    equal gradients, parameter and remainder together are the float32 parameter of the inner
    optimizer, bit for bit (on a CPU, subnormals excepted). Training is the same as under
    `master_weights`, bit for bit.

    Training under the policy `mixed_bfloat16` differs in how ties are rounded. The model computes
    with the larger in magnitude of two equally near bfloat16 values here, and with the even one
    there. The two differ for one float32 value in 131,072. The two trainings differ from the first
    such value on.

    Parameter and remainder are only valid as a pair. If other code writes to a parameter, the
    float32 value is wrong by up to one spacing of bfloat16.

    Args:
      optimizer: any Optax transformation, gradient clipping included. Its state is float32.

    Returns:
      A transformation whose `update` needs `params`. Its updates for bfloat16 parameters are
      `BitUpdate`s, which `optax.apply_updates` adds exactly.

    Raises:
      ValueError: from `init`, if no parameter is bfloat16, or one has another narrow dtype.

    >>> params = {"w": jnp.ones(2, jnp.bfloat16)}
    >>> optimizer = bf16_remainder(optax.sgd(1.0))
    >>> state = optimizer.init(params)
    >>> for _ in range(8):
    ...     grads = {"w": jnp.full(2, 0.001)}  # 1 - 0.001 is 1 in bfloat16
    ...     updates, state = optimizer.update(grads, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> params["w"], join_bf16_remainder(params["w"], state.remainder["w"])
    (Array([0.992188, 0.992188], dtype=bfloat16), Array([0.9920001, 0.9920001], dtype=float32))

    Source: NVIDIA Apex, `DistributedFusedAdam(store_param_remainders=True)`, with the rounding of
    `split_bf16_remainder`.
    """

    def first(params: PyTree, values: PyTree) -> PyTree:
        # All zeros. Computed from the parameters, they have the same sharding, under jit too.
        return map_narrow(lambda p, value: split_bf16_remainder(value)[1], params, values)

    def read(params: PyTree, remainder: PyTree) -> PyTree:
        return map_narrow(join_bf16_remainder, params, remainder)

    def move(
        params: PyTree, remainder: PyTree, values: PyTree, updates: PyTree
    ) -> tuple[PyTree, PyTree]:
        del remainder
        halves = map_narrow(
            lambda p, value, u: split_bf16_remainder(add_float32(value, to_float32(u))),
            params,
            values,
            updates,
        )
        return unzip_narrow(params, halves)

    return narrow_transformation(
        "bf16_remainder",
        fp32_state(optimizer),
        Bf16RemainderState,
        first=first,
        move=move,
        read=read,
        dtypes=(np.dtype(jnp.bfloat16),),
    )
