"""Learning-rate schedules against closed forms in float64, and against Optax's own functions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jmp_train.optim import OptimizerConfig, make_optimizer, make_schedule
from jmp_train.testing import assert_same_bits

STEPS, WARMUP, PEAK = 200, 20, 0.3
N = np.arange(STEPS + 1)
PART = np.clip((N - WARMUP) / (STEPS - WARMUP), 0, 1)  # of the run after the warm-up


def values(**fields):
    config = OptimizerConfig(learning_rate=PEAK, warmup_steps=WARMUP, **fields)
    return [float(make_schedule(config, STEPS)(n)) for n in N]


CLOSED_FORMS = [
    ({"schedule": "cosine", "end_factor": 0.1}, 0.1 + 0.9 * (1 + np.cos(np.pi * PART)) / 2),
    ({"schedule": "linear", "end_factor": 0.5}, 1 - 0.5 * PART),
    ({"schedule": "constant"}, np.ones_like(PART)),
    ({"schedule": "exponential", "decay_rate": 0.01}, 0.01**PART),
    ({"schedule": "polynomial", "power": 3.0, "end_factor": 0.2}, 0.2 + 0.8 * (1 - PART) ** 3),
    (
        {"schedule": "piecewise_constant", "boundaries": (0.25, 0.8), "decay_rate": 0.5},
        0.5 ** (N >= 50).astype(float) * 0.5 ** (N >= 160),
    ),
    ({"schedule": "wsd", "decay_fraction": 0.2}, np.clip((STEPS - N) / 40, 0, 1)),
    (
        {"schedule": "wsd", "decay_fraction": 0.25, "end_factor": 0.1},
        0.1 + 0.9 * np.clip((STEPS - N) / 50, 0, 1),
    ),
]


@pytest.mark.parametrize("fields,factor", CLOSED_FORMS, ids=lambda x: str(x)[:40])
def test_schedule_is_its_closed_form_after_the_warmup(fields, factor):
    expected = PEAK * np.where(N < WARMUP, N / WARMUP, factor)
    # float32: a few units in the last place of numbers up to 0.3, and of a power for exponential.
    np.testing.assert_allclose(values(**fields), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, WARMUP])
def test_default_settings_leave_older_schedules_bitwise_the_same(name, warmup):
    rest = STEPS - warmup
    plain = {
        "cosine": lambda: optax.cosine_decay_schedule(PEAK, rest),
        "linear": lambda: optax.linear_schedule(PEAK, 0.0, rest),
        "constant": lambda: optax.constant_schedule(PEAK),
    }[name]()
    if warmup:
        plain = optax.join_schedules([optax.linear_schedule(0.0, PEAK, warmup), plain], [warmup])
    config = OptimizerConfig(learning_rate=PEAK, schedule=name, warmup_steps=warmup)
    counts = jnp.asarray(N)
    ours, theirs = (
        jnp.broadcast_to(jax.jit(s)(counts), counts.shape)
        for s in (make_schedule(config, STEPS), plain)
    )
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("warmup,start", [(0, 0.3), (50, 0.25)])
def test_onecycle_is_optax_s_and_rises_over_the_warmup(warmup, start):
    config = OptimizerConfig(learning_rate=PEAK, schedule="cosine_onecycle", warmup_steps=warmup)
    ours, theirs = make_schedule(config, STEPS), optax.cosine_onecycle_schedule(STEPS, PEAK, start)
    assert [float(ours(n)) for n in N] == [float(theirs(n)) for n in N]
    assert max(N, key=lambda n: float(ours(n))) == start * STEPS


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("fields", [f for f, _ in CLOSED_FORMS] + [{"schedule": "cosine_onecycle"}])
def test_schedule_of_a_very_short_run_is_finite(fields, steps):
    schedule = make_schedule(OptimizerConfig(learning_rate=PEAK, **fields), steps)
    rates = [float(schedule(n)) for n in range(steps + 1)]
    assert np.all(np.isfinite(rates)) and min(rates) >= 0 and max(rates) <= PEAK * (1 + 1e-6)


def test_boundaries_that_round_to_one_step_multiply():
    config = OptimizerConfig(
        learning_rate=1.0, schedule="piecewise_constant", boundaries=(0.5, 0.55), decay_rate=0.5
    )
    schedule = make_schedule(config, 4)
    assert [float(schedule(n)) for n in range(4)] == [1.0, 1.0, 0.25, 0.25]


def test_own_schedule_replaces_that_of_the_config():
    config = OptimizerConfig(name="sgd", learning_rate=9.0, momentum=0.0, max_grad_norm=None)
    optimizer = make_optimizer(config, steps=10, schedule=lambda n: 0.5 / (1 + n))
    params, grads = {"w": jnp.zeros(2)}, {"w": jnp.ones(2)}
    state = optimizer.init(params)
    for n in range(3):
        updates, state = optimizer.update(grads, state, params)
        np.testing.assert_allclose(updates["w"], [-0.5 / (1 + n)] * 2, rtol=1e-6)


@pytest.mark.parametrize(
    "field,value",
    [
        ("end_factor", -0.1),
        ("end_factor", 1.5),
        ("decay_rate", 0.0),
        ("decay_rate", 2.0),
        ("power", 0.0),
        ("power", float("inf")),
        ("decay_fraction", 0.0),
        ("boundaries", (0.5, 0.5)),
        ("boundaries", (0.0,)),
        ("boundaries", (1.0,)),
        ("boundaries", (float("nan"),)),
    ],
)
def test_invalid_schedule_setting_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field} is .*expected"):
        OptimizerConfig(**{field: value})
