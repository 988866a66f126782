"""Schedules against closed forms, clipping against float64, and refused settings."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jmp_train.optim import OptimizerConfig, make_optimizer, make_schedule


def test_warmup_then_cosine_is_the_closed_form():
    config = OptimizerConfig(learning_rate=0.3, warmup_steps=20)
    schedule = make_schedule(config, steps=220)
    n = np.arange(221)
    cosine = 0.5 * (1 + np.cos(np.pi * np.clip((n - 20) / 200, 0, 1)))
    expected = 0.3 * np.where(n < 20, n / 20, cosine)
    np.testing.assert_allclose([float(schedule(i)) for i in n], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("schedule,end", [("constant", 0.3), ("linear", 0.0), ("cosine", 0.0)])
def test_the_ends_of_each_schedule(schedule, end):
    made = make_schedule(OptimizerConfig(learning_rate=0.3, schedule=schedule), steps=100)
    assert float(made(0)) == pytest.approx(0.3)
    assert float(made(100)) == pytest.approx(end, abs=1e-7)


def test_gradients_are_clipped_by_their_global_norm():
    config = OptimizerConfig(
        name="sgd", learning_rate=1.0, schedule="constant", momentum=0.0, max_grad_norm=2.0
    )
    optimizer = make_optimizer(config, steps=10)
    grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])}  # norm 13
    updates, _ = optimizer.update(grads, optimizer.init(grads), grads)
    np.testing.assert_allclose(updates["a"], [-6 / 13, -8 / 13], rtol=1e-6)
    np.testing.assert_allclose(updates["b"], [-24 / 13], rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "lion", "muon"])
def test_every_optimizer_walks_down_a_quadratic(name):
    config = OptimizerConfig(name=name, learning_rate=0.05, max_grad_norm=None)
    optimizer = make_optimizer(config, steps=100)
    params = {"w": jnp.full((4, 4), 2.0) + jnp.eye(4)}
    state = optimizer.init(params)
    first = float(jnp.sum(params["w"] ** 2))

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update({"w": 2 * params["w"]}, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(100):
        params, state = step(params, state)
    assert float(jnp.sum(params["w"] ** 2)) < 0.7 * first


@pytest.mark.parametrize(
    "field,value",
    [
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("eps", -1.0),
        ("b1", 1.0),
        ("b2", -0.1),
        ("momentum", 1.5),
        ("weight_decay", -1.0),
        ("warmup_steps", -1),
        ("max_grad_norm", 0.0),
    ],
)
def test_invalid_setting_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field} is .*expected"):
        OptimizerConfig(**{field: value})


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="warmup_steps is 10; expected fewer than steps"):
        make_schedule(OptimizerConfig(warmup_steps=10), steps=10)


@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_adam_with_custom_settings_matches_the_float64_closed_form(name):
    # Kingma & Ba 2015, algorithm 1, and Loshchilov & Hutter 2019, algorithm 2, in float64.
    config = OptimizerConfig(
        name=name, learning_rate=0.05, schedule="constant", b1=0.7, b2=0.8, eps=0.3,
        weight_decay=0.4, max_grad_norm=None,
    )  # fmt: skip
    optimizer = make_optimizer(config, steps=10)
    rng = np.random.default_rng(0)
    x = rng.normal(size=5)
    params = jnp.asarray(x, jnp.float32)
    state = optimizer.init(params)
    m = v = np.zeros(5)
    for t in range(1, 8):
        g = rng.normal(size=5)
        updates, state = optimizer.update(jnp.asarray(g, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
        m, v = 0.7 * m + 0.3 * g, 0.8 * v + 0.2 * g**2
        step = (m / (1 - 0.7**t)) / (np.sqrt(v / (1 - 0.8**t)) + 0.3)
        x = x - 0.05 * (step + (0.4 * x if name == "adamw" else 0))
    # Seven float32 updates of numbers of order 1.
    np.testing.assert_allclose(params, x, atol=7 * 4 * 2**-24)


def test_narrow_state_matches_plain_optax_over_narrow_parameters():
    config = OptimizerConfig(schedule="constant", max_grad_norm=None, state="float16", eps=1e-4)
    params = {"w": jnp.linspace(-1, 1, 16, dtype=jnp.float16)}
    rng = np.random.default_rng(0)
    gradients = [{"w": jnp.asarray(rng.normal(size=16), jnp.float16)} for _ in range(5)]
    ends = []
    for optimizer in (make_optimizer(config, steps=5), optax.adamw(1e-3, eps=1e-4)):
        p, state = params, optimizer.init(params)
        for g in gradients:
            updates, state = optimizer.update(g, state, p)
            p = optax.apply_updates(p, updates)
        ends.append((p["w"], optax.tree.get(state, "nu")["w"], optax.tree.get(state, "mu")["w"]))
    for ours, theirs in zip(*ends, strict=True):
        assert ours.dtype == theirs.dtype == jnp.float16
        np.testing.assert_array_equal(ours, theirs)
