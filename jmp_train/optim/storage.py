"""Parameters that were stored in one way, stored in another: narrower, wider, with a master or remainder."""

from __future__ import annotations

from typing import Any

import jax

from jmp_train.numerics.rounding import (
    add_float32,
    join_bf16_remainder,
    round_to_nearest,
    split_bf16_remainder,
    to_float32,
)
from jmp_train.optim.bf16_remainder import Bf16RemainderState
from jmp_train.optim.kahan import KahanState
from jmp_train.optim.master_weights import MasterWeightsState
from jmp_train.optim.narrow_parameters import in_full, is_narrow, map_narrow, widened
from jmp_train.optim.stochastic_rounding import StochasticRoundingState
from jmp_train.tree import same_shapes
from jmp_train.types import PyTree

_KEEPING = (Bf16RemainderState, KahanState, MasterWeightsState, StochasticRoundingState)


def full_parameters(params: PyTree, opt_state: PyTree) -> tuple[PyTree, PyTree]:
    """Return the parameters in float32, with what the state keeps of them, and the inner state.

    Args:
      params: parameters of any floating dtypes.
      opt_state: the state of an optimizer of `make_optimizer`, or of any other one.

    >>> import jax.numpy as jnp, optax
    >>> from jmp_train.optim import master_weights
    >>> params = {"w": jnp.ones(1, jnp.bfloat16)}
    >>> state = master_weights(optax.sgd(0.001)).init(params)
    >>> full, inner = full_parameters(params, state)
    >>> full["w"].dtype.name
    'float32'
    """
    if isinstance(opt_state, MasterWeightsState):
        full = opt_state.master
    elif isinstance(opt_state, Bf16RemainderState):
        full = map_narrow(join_bf16_remainder, params, opt_state.remainder)
    elif isinstance(opt_state, KahanState):
        add = lambda p, c: add_float32(to_float32(p), to_float32(c))
        full = map_narrow(add, params, opt_state.compensation)
    else:
        full = widened(params)
    inner = opt_state.inner if isinstance(opt_state, _KEEPING) else opt_state
    return in_full(params, full), inner


def store_as(
    full: PyTree, inner: PyTree, like_params: PyTree, like_state: PyTree
) -> tuple[PyTree, PyTree]:
    """Return float32 parameters and an inner state as an optimizer stores them.

    Each parameter is rounded once, to nearest. `full_parameters` returns the same float32 values again
    where a master or a remainder is kept (on a CPU, subnormals excepted).

    Args:
      full: parameters in float32.
      inner: state of the inner optimizer.
      like_params: parameters of the dtypes that are wanted.
      like_state: a state of the optimizer that is wanted, of the same inner structure; stochastic
        rounding takes its random key from it.

    Raises:
      ValueError: if the inner states differ in more than dtypes.
    """
    like_inner = like_state.inner if isinstance(like_state, _KEEPING) else like_state
    if not same_shapes(inner, like_inner):
        raise ValueError("the optimizer's state has another structure; expected the same optimizer")
    inner = jax.tree.map(lambda x, like: x.astype(like.dtype), inner, like_inner)
    nearest = lambda p, x: round_to_nearest(x, p.dtype) if is_narrow(p) else x.astype(p.dtype)
    params = jax.tree.map(nearest, like_params, full)
    state: Any = inner
    if isinstance(like_state, MasterWeightsState):
        state = MasterWeightsState(inner, map_narrow(lambda p, x: x, params, full))
    elif isinstance(like_state, Bf16RemainderState):
        halves = lambda at: map_narrow(lambda p, x: split_bf16_remainder(x)[at], params, full)
        params, state = in_full(params, halves(0)), Bf16RemainderState(inner, halves(1))
    elif isinstance(like_state, KahanState):
        lost = lambda p, x, c: round_to_nearest(add_float32(x, -to_float32(p)), c.dtype)
        state = KahanState(inner, map_narrow(lost, params, full, like_state.compensation))
    elif isinstance(like_state, StochasticRoundingState):
        state = StochasticRoundingState(inner, like_state.key)
    return params, state
