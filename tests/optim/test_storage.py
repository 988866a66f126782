"""Parameters moved from one way to store them to another; ml_dtypes rounds independently."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from jmp_train.optim import bf16_remainder, fp32_state, kahan, master_weights, stochastic_rounding
from jmp_train.optim.storage import full_parameters, store_as

KEY = jax.random.key(0)
WAYS = {  # dtype of the parameters, and the optimizer around Adam
    "float32": (np.float32, fp32_state),
    "bfloat16": (ml_dtypes.bfloat16, fp32_state),
    "float16": (np.float16, fp32_state),
    "master, bfloat16": (ml_dtypes.bfloat16, master_weights),
    "master, float16": (np.float16, master_weights),
    "remainder": (ml_dtypes.bfloat16, bf16_remainder),
    "kahan": (ml_dtypes.bfloat16, kahan),
    "stochastic": (ml_dtypes.bfloat16, lambda inner: stochastic_rounding(inner, KEY)),
}
EXACT = {"float32", "master, bfloat16", "master, float16", "remainder"}


def values():
    rng = np.random.default_rng(3)
    w = (rng.normal(size=(64, 33)) * 2.0 ** rng.integers(-12, 3, (64, 33))).astype(np.float32)
    w[0, :4] = [0.0, -0.0, 1.00390625, -1.00390625]  # zeros, and ties of bfloat16
    return {"w": w, "n": {"b": rng.normal(size=7).astype(np.float32)}}


def stored(way, full, steps=0):
    """Return parameters and a state, after some steps of Adam."""
    dtype, make = WAYS[way]
    optimizer = make(optax.adam(1e-3))
    params = jax.tree.map(lambda x: jnp.asarray(x.astype(dtype)), full)
    state = optimizer.init(params)
    for i in range(steps):
        grads = jax.tree.map(lambda x, i=i: jnp.cos(x * i + i), full)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def inner_of(state):
    return getattr(state, "inner", state)


@pytest.mark.parametrize("a,b", list(itertools.product(WAYS, WAYS)))
def test_parameters_move_between_all_ways(a, b):
    full = values()
    params, state = stored(a, full, steps=3)
    moved, new = jax.jit(
        lambda p, s, like, like_state: store_as(*full_parameters(p, s), like, like_state)
    )(params, state, *stored(b, full))
    exact, _ = full_parameters(params, state)
    for x, wide in zip(jax.tree.leaves(moved), jax.tree.leaves(exact), strict=True):
        wide = np.asarray(wide)
        assert wide.dtype == np.float32 and x.dtype == WAYS[b][0]
        rounded = wide.astype(WAYS[b][0])
        found, rounded = np.asarray(x).astype(np.float64), rounded.astype(np.float64)
        # A remainder takes the larger of two equally near values, ml_dtypes the even one.
        np.testing.assert_array_equal(np.abs(found - wide), np.abs(rounded - wide))
        assert b == "remainder" or np.array_equal(found, rounded)
    for x, y in zip(jax.tree.leaves(inner_of(new)), jax.tree.leaves(inner_of(state)), strict=True):
        np.testing.assert_array_equal(x, y)
    if b in EXACT:
        again, _ = full_parameters(moved, new)
        for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(exact), strict=True):
            np.testing.assert_array_equal(
                np.asarray(x).view(np.uint32), np.asarray(y).view(np.uint32)
            )


@pytest.mark.parametrize("way", sorted(EXACT - {"float32"}))
def test_what_is_kept_is_the_value_that_training_has(way):
    """After three steps, a master and a remainder are float32 training, as their own tests prove."""
    full = jax.tree.map(lambda x: x.astype(WAYS[way][0]).astype(np.float32), values())
    wide, _ = full_parameters(*stored(way, full, steps=3))
    expected, _ = stored("float32", full, steps=3)
    for x, y in zip(jax.tree.leaves(wide), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_compensation_is_added_to_its_parameter():
    full = values()
    params, state = stored("kahan", full, steps=3)
    wide, _ = full_parameters(params, state)
    for x, p, c in zip(*map(jax.tree.leaves, (wide, params, state.compensation)), strict=True):
        exact = np.asarray(p).astype(np.float64) + np.asarray(c).astype(np.float64)
        np.testing.assert_array_equal(x, exact.astype(np.float32))
    assert any(np.any(np.asarray(c) != 0) for c in jax.tree.leaves(state.compensation))


def test_another_optimizer_is_refused():
    params, state = stored("float32", values())
    other = optax.sgd(0.1, momentum=0.9).init(params)
    with pytest.raises(ValueError, match="expected the same optimizer"):
        store_as(*full_parameters(params, state), params, other)
