"""The automatic number of steps in a call: what bounds it, and the operations that it counts."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jmp_train.config.find import find_experiment
from jmp_train.runs.steps_per_call import choose_steps_per_call, count_flops


def choose(start=0, flops=6e7, step_bytes=1000, platform="cpu", step=None, **fields):
    experiment = dataclasses.replace(find_experiment("mlp_fp32"), **fields)
    step = step or jax.make_jaxpr(lambda x: x + x)(jax.ShapeDtypeStruct((int(flops),), "float32"))
    return choose_steps_per_call(
        experiment, start, step=step.jaxpr, step_bytes=step_bytes, platform=platform
    )


@pytest.mark.parametrize(
    "case,expected",
    [
        ({}, 100),  # of 1.2 ms each, of at most 1 s: all that are between two records
        ({"flops": 6e8}, 50),  # of 12 ms: the largest divisor of 100 below 83
        ({"flops": 6e9}, 5),  # of 120 ms
        ({"flops": 6e10}, 1),
        ({"log_every": 30}, 10),
        ({"steps": 2002}, 2),
        ({"start": 25}, 25),
        ({"flops": 6e8, "platform": "gpu"}, 100),  # of 30 microseconds
        ({"flops": 1e11, "platform": "gpu"}, 20),  # of 5 ms, of at most 0.1 s
        ({"flops": 1e12, "platform": "gpu"}, 1),  # of 50 ms
        ({"step_bytes": 2**23}, 4),
        ({"steps_per_call": 5}, 5),
    ],
)
def test_intervals_latency_and_memory_bound_the_choice(case, expected):
    assert choose(**case) == expected


def test_convolutions_are_not_put_in_a_loop_on_a_cpu():
    x, kernel = jnp.ones((2, 4, 8, 8)), jnp.ones((6, 4, 3, 3))
    conv = jax.jit(lambda x, k: jax.lax.conv(x, k, (1, 1), "VALID"))
    step = jax.make_jaxpr(lambda x, k: conv(x, k) + 1)(x, kernel)  # in an inner jaxpr
    assert choose(step=step) == 1
    assert choose(step=step, platform="gpu") == 100


def test_products_in_a_scan_count_once_per_iteration():
    def loop(w, x):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, length=7)[0]

    jaxpr = jax.make_jaxpr(loop)(jnp.ones((3, 3)), jnp.ones((2, 3)))
    assert count_flops(jaxpr.jaxpr) == 7 * 2 * 2 * 3 * 3


def test_a_convolutions_operations_are_counted():
    x, kernel = jnp.ones((2, 4, 8, 8)), jnp.ones((6, 4, 3, 3))
    conv = lambda x, k: jax.lax.conv(x, k, (1, 1), "VALID")
    jaxpr = jax.make_jaxpr(conv)(x, kernel)
    assert count_flops(jaxpr.jaxpr) == 2 * (2 * 6 * 6 * 6) * (4 * 3 * 3)
