"""Narrow parameters with the error of their last rounding in the optimizer's state."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from jmp_train.numerics.rounding import kahan_add, to_float32
from jmp_train.optim.fp32_state import fp32_state
from jmp_train.optim.narrow_parameters import (
    NarrowParameters,
    map_narrow,
    narrow_transformation,
    unzip_narrow,
)
from jmp_train.types import PyTree


class KahanState(NamedTuple):
    """State of `kahan`."""

    inner: PyTree  # state of the inner optimizer, float32
    compensation: PyTree  # like the parameters, bfloat16; None for a float32 parameter


def kahan(optimizer: optax.GradientTransformation) -> NarrowParameters:
    """Run an optimizer on narrow parameters and add its updates with Kahan's compensation.

    The error of each rounding is stored in bfloat16 and added at the next update (`kahan_add`).
    Small updates accumulate in this compensation until they move the parameter. The state takes
    2 bytes a parameter.

    The compensation has 8 significant bits, which limits how small an update may be. Updates of up
    to 2^-10 of the parameter's spacing stall once the compensation is near half of the spacing.
    That is 2^-18 to 2^-17 of a bfloat16 parameter and 2^-21 to 2^-20 of a float16 one, depending on
    the parameter's place between two powers of two. The sum of equal updates of 2^-16 (float16:
    2^-19) of a parameter has an error of up to 20 %, and half as much for each doubling of their
    size. The sum of varying updates of that size has an error of up to 3 %. For float32 training,
    use `bf16_remainder`, or `master_weights` for float16.

    The compensation is bfloat16 for every dtype, because float16 lacks the exponent range: half of
    the spacing of a float16 below 2^-4 is already subnormal.

    The inner optimizer sees narrow parameters without their compensation. It updates float32
    parameters directly.

    Args:
      optimizer: any Optax transformation, gradient clipping included. Its state is float32.

    Returns:
      A transformation whose `update` needs `params`. Its updates for narrow parameters are
      `BitUpdate`s, which `optax.apply_updates` adds exactly.

    Raises:
      ValueError: from `init`, if no parameter is bfloat16, float16, float8_e4m3fn or float8_e5m2,
        or one has another narrow dtype.

    >>> params = {"w": jnp.ones(2, jnp.bfloat16)}
    >>> optimizer = kahan(optax.sgd(1.0))
    >>> state = optimizer.init(params)
    >>> for _ in range(8):
    ...     grads = {"w": jnp.full(2, 0.001)}  # 1 - 0.001 is 1 in bfloat16
    ...     updates, state = optimizer.update(grads, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> params["w"], state.compensation["w"]
    (Array([0.992188, 0.992188], dtype=bfloat16), Array([-0.000184059, -0.000184059], dtype=bfloat16))

    Source: Zamirai et al. 2020, "Revisiting BFloat16 Training", algorithm 3.
    """

    def first(params: PyTree, values: PyTree) -> PyTree:
        del values
        # All zeros. Computed from the parameters, they have the same sharding, under jit too.
        zeros = map_narrow(lambda p: jnp.zeros_like(p, dtype=jnp.bfloat16), params)
        return map_narrow(lambda p, zero: kahan_add(p, zero, zero)[1], params, zeros)

    def move(
        params: PyTree, compensation: Any, values: PyTree, updates: PyTree
    ) -> tuple[PyTree, PyTree]:
        del values
        sums = map_narrow(
            lambda p, lost, u: kahan_add(p, lost, to_float32(u)), params, compensation, updates
        )
        return unzip_narrow(params, sums)

    return narrow_transformation("kahan", fp32_state(optimizer), KahanState, first=first, move=move)
