"""Narrow parameters with what their rounding lost, in 16 bits, in the optimizer's state."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from jmp_train.numerics.rounding import kahan_add, to_float32
from jmp_train.optim.fp32_state import fp32_state
from jmp_train.optim.narrow_parameters import (
    NarrowParameters,
    bit_updates,
    check_narrow,
    in_full,
    map_narrow,
)


class KahanState(NamedTuple):
    """The state of `kahan`."""

    inner: Any  # of the inner optimizer, float32
    compensation: Any  # like the parameters, bfloat16; None for a parameter that is float32


def kahan(optimizer: optax.GradientTransformation) -> NarrowParameters:
    """Runs an optimizer on narrow parameters and adds its updates with Kahan's compensation.

    What a rounding loses is kept in bfloat16 and added at the next update: `kahan_add`. Small
    updates gather there until they move the parameter. A compensation near half of the parameter's
    spacing has 8 bits, too: updates of up to 2^-10 of the spacing stall, which is 2^-18 to 2^-17 of
    a bfloat16 parameter and 2^-21 to 2^-20 of a float16 one, depending on its place between two
    powers of two. Equal updates of 2^-16 (float16: 2^-19) of a parameter sum up to 20 % off, and
    half as much for each doubling of their size; updates that vary sum up to 3 % off there. For
    float32 training take `bf16_remainder`, or `master_weights` for float16.

    The compensation is bfloat16 for every dtype because float16 would run out of exponent: half a
    spacing of a float16 below 2^-4 is already subnormal.

    2 bytes a parameter in the state. A parameter in float32 is left to the inner optimizer, which
    sees the narrow ones without their compensation.

    Args:
      optimizer: any Optax transformation, clipping and the like inside it. Its state is float32.

    Returns:
      A transformation whose `update` wants `params`. Its updates for narrow parameters are
      `BitUpdate`s, which `optax.apply_updates` adds exactly.

    Raises:
      ValueError: from `init`, if no parameter is bfloat16, float16, float8_e4m3fn or float8_e5m2,
        or one is in another narrow dtype.

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
    inner = fp32_state(optimizer)

    def init(params: Any) -> KahanState:
        check_narrow("kahan", params)
        # Zeros; computed from the parameters, they are sharded as these are, under jit too.
        zeros = map_narrow(lambda p: jnp.zeros_like(p, dtype=jnp.bfloat16), params)
        compensation = map_narrow(lambda p, zero: kahan_add(p, zero, zero)[1], params, zeros)
        return KahanState(inner.init(in_full(params)), compensation)

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, KahanState]:
        updates, inner_state = inner.update(updates, state.inner, in_full(params), **extra_args)
        sums = map_narrow(
            lambda p, lost, u: kahan_add(p, lost, to_float32(u)),
            params,
            state.compensation,
            updates,
        )
        new = map_narrow(lambda p, both: both[0], params, sums)
        compensation = map_narrow(lambda p, both: both[1], params, sums)
        return bit_updates(updates, params, new), KahanState(inner_state, compensation)

    return NarrowParameters(init, update)
