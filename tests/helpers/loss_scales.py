"""Sequences of finite and non-finite steps, and the states that a loss scale passes through."""

import dataclasses
from functools import partial
from typing import Any

import chex
import jax
import numpy as np
from hypothesis import strategies as st

LENGTH = 64  # every hypothesis sequence is padded to this, so that each machine compiles once
with_and_without_jit: Any = partial(chex.variants, with_jit=True, without_jit=True)
SMALLEST_NORMAL = 2.0**-126
LARGEST_POWER = 2.0**127

finite_steps = st.lists(st.booleans(), min_size=1, max_size=LENGTH)
rarely_overflowing = st.lists(
    st.integers(0, 9).map(lambda n: n > 0), min_size=LENGTH // 2, max_size=LENGTH
)
sequences = finite_steps | rarely_overflowing


def pad(finite):
    return np.array([*finite, *[True] * (LENGTH - len(finite))])


@jax.jit
def adjust_all(state, finite):
    """The states after each step, by a scan."""

    def step(state, finite):
        state = state.adjust(finite)
        return state, state

    return jax.lax.scan(step, state, finite)[1]


def trajectory(state, finite):
    states = adjust_all(state, pad(finite))
    return np.asarray(states.loss_scale)[: len(finite)], np.asarray(states.counter)[: len(finite)]


def fields(state):
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
