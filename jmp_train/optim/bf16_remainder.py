"""bfloat16 parameters with the other half of a float32 in the optimizer's state."""

from __future__ import annotations

from typing import Any, NamedTuple

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
    bit_updates,
    check_narrow,
    in_full,
    map_narrow,
)


class Bf16RemainderState(NamedTuple):
    """The state of `bf16_remainder`."""

    inner: Any  # of the inner optimizer, float32
    remainder: Any  # like the parameters, uint16; None for one that is float32


def bf16_remainder(optimizer: optax.GradientTransformation) -> NarrowParameters:
    """Runs an optimizer on float32 parameters of which the model sees the nearest bfloat16.

    The bfloat16 parameter and a 16-bit remainder are together the float32. On equal gradients they
    are the float32 parameters of the inner optimizer, bit for bit (on a CPU but for subnormals), and
    training is that of `master_weights`, bit for bit, at 2 bytes a parameter in the state in place
    of 4. Training with the policy `mixed_bfloat16` differs in one thing: what the model sees of a
    parameter halfway between two bfloat16 is the larger in magnitude here, and the even one there.
    For one value in 131,072 these are not the same, and from its first such value on neither is the
    training.

    The two halves belong together: a parameter written to from outside is misread by up to one
    spacing of bfloat16.

    Args:
      optimizer: any Optax transformation, clipping and the like inside it. Its state is float32.

    Returns:
      A transformation whose `update` wants `params`. Its updates for bfloat16 parameters are
      `BitUpdate`s, which `optax.apply_updates` adds exactly.

    Raises:
      ValueError: from `init`, if no parameter is bfloat16, or one is in another narrow dtype.

    >>> params = {"w": jnp.ones(2, jnp.bfloat16)}
    >>> optimizer = bf16_remainder(optax.sgd(1.0))
    >>> state = optimizer.init(params)
    >>> for _ in range(8):
    ...     grads = {"w": jnp.full(2, 0.001)}  # 1 - 0.001 is 1 in bfloat16
    ...     updates, state = optimizer.update(grads, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> params["w"], join_bf16_remainder(params["w"], state.remainder["w"])
    (Array([0.992188, 0.992188], dtype=bfloat16), Array([0.9920001, 0.9920001], dtype=float32))

    Source: NVIDIA Apex, `DistributedFusedAdam(store_param_remainders=True)`; the rounding is that
    of `split_bf16_remainder`.
    """
    inner = fp32_state(optimizer)

    def init(params: Any) -> Bf16RemainderState:
        check_narrow("bf16_remainder", params, (np.dtype(jnp.bfloat16),))
        # Zeros; computed from the parameters, they are sharded as these are, under jit too.
        remainder = map_narrow(lambda p: split_bf16_remainder(to_float32(p))[1], params)
        return Bf16RemainderState(inner.init(in_full(params)), remainder)

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Bf16RemainderState]:
        joined = map_narrow(join_bf16_remainder, params, state.remainder)
        full = in_full(params, joined)
        updates, inner_state = inner.update(updates, state.inner, full, **extra_args)
        halves = map_narrow(
            lambda p, m, u: split_bf16_remainder(add_float32(m, to_float32(u))),
            params,
            joined,
            updates,
        )
        new = map_narrow(lambda p, both: both[0], params, halves)
        remainder = map_narrow(lambda p, both: both[1], params, halves)
        return bit_updates(updates, params, new), Bf16RemainderState(inner_state, remainder)

    return NarrowParameters(init, update)
