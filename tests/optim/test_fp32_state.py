"""Optimizer state is float32 whatever the parameters are, and the update is the float32 one."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import jmp_train as jt
from jmp_train.optim import OptimizerConfig, make_optimizer

NAMES = ("adamw", "adam", "sgd", "lion", "muon")


def floating_dtypes(tree):
    leaves = jax.tree.leaves(tree)
    return {str(x.dtype) for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("name", NAMES)
def test_state_and_updates_are_float32_for_every_optimizer_offered(name, dtype):
    optimizer = make_optimizer(OptimizerConfig(name=name), steps=10)
    params = {"w": jnp.ones((4, 3), dtype), "b": jnp.ones(3, dtype)}
    state = optimizer.init(params)
    assert floating_dtypes(state) == {"float32"}
    updates, state = optimizer.update(params, state, params)
    assert floating_dtypes((updates, state)) == {"float32"}
    assert floating_dtypes(optax.apply_updates(params, updates)) == {str(jnp.dtype(dtype))}


def test_optax_alone_does_keep_its_state_in_the_parameters_dtype():
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    assert floating_dtypes(optax.adam(0.1).init(params)) == {"bfloat16"}


def test_float64_stays_float64():
    with jax.enable_x64(True):
        params = {"w": jnp.ones(3, jnp.float64)}
        assert floating_dtypes(jt.optim.fp32_state(optax.adam(0.1)).init(params)) == {"float64"}


def test_a_dtype_that_the_optimizer_was_told_to_use_is_kept():
    state = jt.optim.fp32_state(optax.adam(0.1, mu_dtype=jnp.bfloat16)).init({"w": jnp.ones(3)})
    assert state[0].mu["w"].dtype == jnp.bfloat16


def adam_float64(params, grads, rate, steps, round_to):
    """Kingma & Ba 2015, algorithm 1, in float64, the parameter rounded once after each step."""
    m = v = np.zeros_like(params, dtype=np.float64)
    x = params.astype(np.float64)
    for t in range(1, steps + 1):
        m, v = 0.9 * m + 0.1 * grads, 0.999 * v + 0.001 * grads**2
        x = x - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        x = x.astype(round_to).astype(np.float64)
    return x


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_adam_on_16_bit_parameters_follows_float64_adam(dtype):
    # The gradients' squares, 1e-10 and below, are 0 in float16 and their average stalls in bf16.
    rng = np.random.default_rng(0)
    start = rng.normal(size=200).astype(dtype)
    grads = (rng.normal(size=200) * 1e-5).astype(dtype)
    optimizer = jt.optim.fp32_state(optax.adam(0.1))
    params = jnp.asarray(start)
    state = optimizer.init(params)
    for _ in range(20):
        updates, state = optimizer.update(jnp.asarray(grads), state, params)
        params = optax.apply_updates(params, updates)
    expected = adam_float64(start, grads.astype(np.float64), 0.1, 20, dtype)
    # A float32 update differs from the float64 one by some 1e-7, which can move a rounding to the
    # neighbouring 16-bit value (2^-8 or 2^-11 apart): allow one such step, and few of them.
    step = float(ml_dtypes.finfo(dtype).eps) * np.maximum(np.abs(expected), 1.0)
    difference = np.abs(np.asarray(params, np.float64) - expected)
    assert (difference <= step).all()
    assert (difference > 0).mean() < 0.05


def test_an_optimizer_sees_16_bit_parameters_in_float32():
    seen = []

    def update(updates, state, params):
        seen.append((updates.dtype, params.dtype))
        return updates, state

    optimizer = jt.optim.fp32_state(optax.GradientTransformation(lambda params: (), update))
    optimizer.update(jnp.ones(2, jnp.float16), (), jnp.ones(2, jnp.bfloat16))
    assert seen == [(jnp.float32, jnp.float32)]
