"""A loss scale stays within its limits, and numbers that cannot work are refused."""

import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.loss_scales import (
    LARGEST_POWER,
    SMALLEST_NORMAL,
    adjust_all,
    fields,
    pad,
    sequences,
    trajectory,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import jmp_train as jt


def test_a_scale_never_backs_off_below_its_minimum_nor_grows_above_its_maximum():
    down, _ = trajectory(jt.DynamicLossScale(16.0, min_loss_scale=3.0), [False] * 6)
    assert down.tolist() == [8, 4, 3, 3, 3, 3]
    up, _ = trajectory(jt.DynamicLossScale(16.0, period=1, max_loss_scale=100), [True] * 6)
    assert up.tolist() == [32, 64, 100, 100, 100, 100]


def test_a_scale_that_starts_outside_its_limits_is_kept_until_it_moves_the_right_way():
    above = jt.DynamicLossScale(64.0, period=1, max_loss_scale=32.0)
    assert trajectory(above, [True, False, False, True])[0].tolist() == [64, 32, 16, 32]
    below = jt.DynamicLossScale(1.0, period=1, min_loss_scale=8.0)
    assert trajectory(below, [True, False])[0].tolist() == [2, 8]


def test_limits_above_the_range_of_int32_may_be_integers():
    state = jt.DynamicLossScale(2**33, period=1, min_loss_scale=2**32, max_loss_scale=2**34)
    assert trajectory(state, [True, True])[0].tolist() == [2.0**34] * 2
    assert trajectory(state, [False] * 3)[0].tolist() == [2.0**32] * 3
    assert jt.StaticLossScale(2**40).scale(jnp.float32(1)) == 2.0**40


def test_a_minimum_of_zero_never_lets_the_scale_become_zero():
    state = jt.DynamicLossScale(2.0**-124, min_loss_scale=0)
    scale, _ = trajectory(state, [False] * 6)
    assert scale.tolist() == [2.0**-125] + [SMALLEST_NORMAL] * 5


@pytest.mark.parametrize("start", [LARGEST_POWER, float(np.finfo(np.float32).max)])
def test_a_scale_at_the_top_of_float32_does_not_overflow_and_still_counts(start):
    state = jt.DynamicLossScale(start, period=2)
    scale, counter = trajectory(state, [True] * 5)
    assert scale.tolist() == [start] * 5
    assert counter.tolist() == [1, 0, 1, 0, 1]
    assert trajectory(state, [False])[0].tolist() == [start / 2]


@settings(max_examples=25, deadline=None)
@given(finite=sequences, exponent=st.integers(-20, 127))
def test_powers_of_two_stay_powers_of_two(finite, exponent):
    limits: Any = {"period": 1, "min_loss_scale": 2.0**-30}
    for more in ({}, {"backoff_factor": 0.25, "max_loss_scale": 2.0**40, "hysteresis": 2}):
        scale, _ = trajectory(jt.DynamicLossScale(2.0**exponent, **limits, **more), finite)
        assert {math.frexp(s)[0] for s in scale.tolist()} == {0.5}


def test_counters_at_the_top_of_int32_do_not_wrap():
    top = 2**31 - 1
    state = jt.DynamicLossScale(8.0, top - 2, period=top, hysteresis=top, hysteresis_left=2)
    scale, counter = trajectory(state, [True] * 3)
    assert scale.tolist() == [8, 16, 16] and counter.tolist() == [top - 1, 0, 1]
    left = adjust_all(state, pad([False, False, False, True])).hysteresis_left[:4]
    assert left.tolist() == [1, 0, 0, 0]
    assert state.adjust(True).adjust(True).hysteresis_left == top
    past = jt.DynamicLossScale(8.0, top, period=2)  # a period that was shortened in mid-run
    assert trajectory(past, [True])[1].tolist() == [0]


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    "wrong,message",
    [
        ({"loss_scale": -0.0}, "loss_scale is -0.0; expected 0 < it < inf"),
        ({"loss_scale": 0.0}, "loss_scale is 0.0; expected 0 < it < inf"),
        ({"loss_scale": -1.0}, "loss_scale is -1.0; expected 0 < it < inf"),
        ({"loss_scale": NAN}, "loss_scale is nan; expected 0 < it < inf"),
        ({"loss_scale": np.float32(INF)}, "loss_scale is inf; expected 0 < it < inf"),
        ({"loss_scale": 1e39}, "loss_scale is inf; expected 0 < it < inf"),
        ({"loss_scale": jnp.float32(-1)}, "loss_scale is -1.0; expected 0 < it < inf"),
        ({"loss_scale": jnp.bfloat16(NAN)}, "loss_scale is nan; expected 0 < it < inf"),
        ({"loss_scale": 1e-40}, "is .*e-4.; expected .* at least 1.18e-38, the smallest normal"),
        ({"loss_scale": np.ones(1)}, r"loss_scale has shape \(1,\); expected a scalar"),
        ({"loss_scale": jnp.ones(2)}, r"loss_scale has shape \(2,\); expected a scalar"),
        ({"counter": 2**64}, "counter is 18446744073709551616; expected 0 to 2147483647"),
        ({"counter": jnp.int32(-1)}, "counter is -1; expected 0 to 2147483647"),
        ({"counter": np.int64(2**31)}, "counter is 2147483648; expected 0 to 2147483647"),
        ({"counter": np.zeros(1, int)}, r"counter has shape \(1,\); expected a scalar"),
        ({"period": 0}, "period is 0; expected 1 to 2147483647 steps"),
        ({"period": 2**31}, "period is 2147483648; expected 1 to 2147483647"),
        ({"period": 2.5}, "period is 2.5; expected a whole number of steps"),
        ({"period": NAN}, "period is nan; expected a whole number of steps"),
        ({"factor": 0.5}, "factor is 0.5; expected at least 1, such as 2"),
        ({"factor": NAN}, "factor is nan; expected at least 1, such as 2"),
        ({"factor": INF}, "factor is inf; expected at least 1, such as 2"),
        ({"backoff_factor": 0.0}, "backoff_factor is 0.0; expected 0 < it <= 1"),
        ({"backoff_factor": 2.0}, "backoff_factor is 2.0; expected 0 < it <= 1"),
        ({"backoff_factor": NAN}, "backoff_factor is nan; expected 0 < it <= 1"),
        ({"min_loss_scale": -1.0}, "min_loss_scale is -1.0; expected 0 <= it < inf"),
        ({"min_loss_scale": NAN}, "min_loss_scale is nan; expected 0 <= it < inf"),
        ({"max_loss_scale": 0.5}, "max_loss_scale 0.5 is below min_loss_scale 1.0"),
        ({"max_loss_scale": NAN}, "max_loss_scale nan is below min_loss_scale 1.0"),
        ({"min_loss_scale": 1e39}, "min_loss_scale is 1e\\+39; expected 0 <= it < inf"),
        ({"hysteresis": 0}, "hysteresis is 0; expected 1 to 2147483647 steps"),
        ({"hysteresis": 2**31}, "hysteresis is 2147483648; expected 1 to 2147483647"),
        ({"hysteresis": 2, "hysteresis_left": 3}, "hysteresis_left is 3; expected 0 to 2"),
        ({"counter": -1}, "counter is -1; expected 0 to 2147483647"),
        ({"counter": 2**31}, "counter is 2147483648; expected 0 to 2147483647"),
        ({"hysteresis": 1.5}, "hysteresis is 1.5; expected a whole number of steps"),
    ],
)
def test_a_number_that_cannot_work_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        jt.DynamicLossScale(**({"loss_scale": 1.0} | wrong))


@pytest.mark.parametrize(
    "wrong,message",
    [
        ({"loss_scale": "65536"}, "loss_scale is '65536'; expected a number"),
        ({"loss_scale": None}, "loss_scale is None; expected a number"),
        ({"loss_scale": [2.0j]}, "loss_scale is \\[2j\\]; expected a number"),
        ({"counter": 3.0}, "counter is 3.0; expected a whole number"),
        ({"counter": jnp.float32(3)}, "counter is of float32; expected a whole number"),
        ({"hysteresis": 2, "hysteresis_left": "1"}, "hysteresis_left is '1'; expected a whole number"),
    ],
)  # fmt: skip
def test_a_scale_or_counter_that_is_no_number_is_a_type_error(wrong, message):
    with pytest.raises(TypeError, match=message):
        jt.DynamicLossScale(**({"loss_scale": 1.0} | wrong))


def test_a_traced_scale_is_taken_and_its_shape_checked():
    make = jax.jit(lambda scale, counter: jt.DynamicLossScale(scale, counter))
    assert make(2.0, 3) == jt.DynamicLossScale(2.0, 3)
    assert jt.DynamicLossScale(SMALLEST_NORMAL).loss_scale == SMALLEST_NORMAL
    with pytest.raises(ValueError, match=r"loss_scale has shape \(2,\)"):
        make(jnp.ones(2), 3)


def test_no_maximum_and_an_infinite_one_are_the_same():
    assert jt.DynamicLossScale(1.0, max_loss_scale=INF).max_loss_scale is None


@pytest.mark.parametrize("name", jt.DynamicLossScale._STATIC)
def test_a_hyper_parameter_that_is_no_number_or_traced_is_a_type_error(name):
    wrong: Any = {name: "two"}
    with pytest.raises(TypeError, match=f"{name} is 'two'; expected a number"):
        jt.DynamicLossScale(1.0, **wrong)
    with pytest.raises(TypeError, match=f"{name} is traced; expected a number"):
        jax.jit(lambda x: jt.DynamicLossScale(1.0, **{name: x}))(1.0)


def test_hyper_parameters_may_be_concrete_arrays():
    state = jt.DynamicLossScale(
        1.0, period=np.int64(5), factor=jnp.float32(2), min_loss_scale=jnp.ones([])
    )
    assert (state.period, state.factor, state.min_loss_scale) == (5, 2.0, 1.0)
    assert type(state.period) is int
    hash(jax.tree.structure(state))


def test_an_integer_array_as_scale_warns_and_becomes_float32():
    with pytest.warns(UserWarning, match="Expected floating type for loss_scale, got int32"):
        state = jt.DynamicLossScale(jnp.int32(4))
    assert state.loss_scale.dtype == jnp.float32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jt.DynamicLossScale(4)


@pytest.mark.parametrize(
    "policy,kind",
    [
        ("float32", jt.NoOpLossScale),
        ("mixed_bfloat16", jt.NoOpLossScale),
        ("bf16", jt.NoOpLossScale),
        ("mixed_float16", jt.DynamicLossScale),
        ("f16", jt.DynamicLossScale),
        ("p=f16,c=f32", jt.DynamicLossScale),
    ],
)
def test_a_policy_that_computes_in_float16_gets_gradscalers_defaults(policy, kind):
    loss_scale = jt.default_loss_scale(jt.get_policy(policy))
    assert type(loss_scale) is kind
    if isinstance(loss_scale, jt.DynamicLossScale):
        assert fields(loss_scale) == fields(jt.DynamicLossScale(65536.0, period=2000, factor=2))
