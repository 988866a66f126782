"""A loss scale moves as GradScaler, jmp, Flax, Megatron-LM and DeepSpeed move theirs."""

import itertools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.loss_scales import (
    LARGEST_POWER,
    LENGTH,
    adjust_all,
    pad,
    sequences,
    trajectory,
)
from helpers.marks import slow
from hypothesis import example, given, settings
from hypothesis import strategies as st
from make_gradscaler_trajectories import PATH, gradscaler_trajectory

import jmp_train as jt


@pytest.mark.parametrize("period,factor", [(1, 2), (2, 2), (3, 2), (5, 4), (3, 1.5)])
@settings(max_examples=25, deadline=None)
@given(finite=sequences)
@example(finite=[False] * LENGTH)
@example(finite=[True] * LENGTH)
def test_trajectory_is_that_of_jmp(period, factor, finite):
    jmp = pytest.importorskip("jmp")
    theirs = jmp.DynamicLossScale(jnp.float32(2.0**10), jnp.int32(0), period, factor)
    ours = jt.DynamicLossScale(jnp.float32(2.0**10), jnp.int32(0), period, factor)
    states = adjust_all(theirs, pad(finite))
    scale, counter = trajectory(ours, finite)
    np.testing.assert_array_equal(scale, np.asarray(states.loss_scale)[: len(finite)])
    np.testing.assert_array_equal(counter, np.asarray(states.counter)[: len(finite)])


@jax.jit
def flax_trajectory(state, finite):
    def step(state, finite):
        grad_fn = state.value_and_grad(lambda x: jnp.where(finite, 1.0, jnp.inf) * x)
        state, is_finite, *_ = grad_fn(jnp.float32(1))
        return state, (state.scale, state.fin_steps, is_finite)

    return jax.lax.scan(step, state, finite)[1]


@pytest.mark.parametrize("interval", [0, 1, 2, 5])
@pytest.mark.parametrize("factor,backoff", [(2.0, 0.5), slow(4.0, 0.25), slow(1.5, 0.75)])
@settings(max_examples=25, deadline=None)
@given(finite=sequences)
@example(finite=[True] * LENGTH)
def test_trajectory_is_that_of_flax_whose_interval_is_our_period_less_one(
    interval, factor, backoff, finite
):
    flax = pytest.importorskip("flax.training.dynamic_scale")
    theirs = flax.DynamicScale(
        growth_factor=factor,
        backoff_factor=backoff,
        growth_interval=interval,
        fin_steps=jnp.int32(0),
        scale=jnp.float32(2.0**10),
        minimum_scale=0.25,
    )
    ours = jt.DynamicLossScale(
        2.0**10,
        period=interval + 1,
        factor=factor,
        backoff_factor=backoff,
        min_loss_scale=0.25,
        max_loss_scale=float(np.finfo(np.float32).max),
    )
    scale, counter, is_finite = (np.asarray(x)[: len(finite)] for x in
                                 flax_trajectory(theirs, pad(finite)))  # fmt: skip
    np.testing.assert_array_equal(is_finite, finite)  # the drive works
    ours_scale, ours_counter = trajectory(ours, finite)
    # Up to where Flax, on overflow, takes float32's maximum: the states part there (see below).
    same = np.cumsum(scale == np.finfo(np.float32).max) == 0
    np.testing.assert_array_equal(ours_scale[same], scale[same])
    np.testing.assert_array_equal(ours_counter[same], counter[same])


def test_flax_with_the_same_number_grows_one_step_later():
    flax = pytest.importorskip("flax.training.dynamic_scale")
    theirs = flax.DynamicScale(
        growth_interval=3, fin_steps=jnp.int32(0), scale=jnp.float32(1.0), minimum_scale=1.0
    )
    finite = [True] * 12
    theirs_scale = np.asarray(flax_trajectory(theirs, np.array(finite))[0])
    ours_scale, _ = trajectory(jt.DynamicLossScale(1.0, period=3), finite)
    steps = np.arange(1, 13)
    np.testing.assert_array_equal(theirs_scale, 2.0 ** (steps // 4))
    np.testing.assert_array_equal(ours_scale, 2.0 ** (steps // 3))


def test_flax_grows_to_the_largest_float32_where_we_stay_at_a_power_of_two():
    flax = pytest.importorskip("flax.training.dynamic_scale")
    theirs = flax.DynamicScale(
        growth_interval=0, fin_steps=jnp.int32(0), scale=jnp.float32(LARGEST_POWER)
    )
    theirs_scale = np.asarray(flax_trajectory(theirs, np.array([True]))[0])
    assert theirs_scale[0] == np.finfo(np.float32).max
    ours_scale, _ = trajectory(jt.DynamicLossScale(LARGEST_POWER, period=1), [True])
    assert ours_scale[0] == LARGEST_POWER


def from_gradscaler(init_scale, growth_factor, backoff_factor, growth_interval):
    return jt.DynamicLossScale(
        init_scale,
        period=growth_interval,
        factor=growth_factor,
        backoff_factor=backoff_factor,
        min_loss_scale=0,
    )


@pytest.mark.parametrize("period", [1, 2, 5])
@pytest.mark.parametrize("factor,backoff", [(2.0, 0.5), (4.0, 0.5), (1.5, 0.75)])
def test_trajectory_is_that_of_a_live_gradscaler(period, factor, backoff):
    pytest.importorskip("torch")

    @settings(max_examples=25, deadline=None)
    @given(finite=sequences, exponent=st.sampled_from([-30, 0, 16, 120]))
    def check(finite, exponent):
        numbers = {
            "init_scale": 2.0**exponent,
            "growth_factor": factor,
            "backoff_factor": backoff,
            "growth_interval": period,
        }
        theirs = gradscaler_trajectory(finite, **numbers)
        scale, counter = trajectory(from_gradscaler(**numbers), finite)
        assert scale.tolist() == [scale for scale, _ in theirs]
        assert counter.tolist() == [tracker for _, tracker in theirs]

    check()


GOLDEN = json.loads(PATH.read_text())["cases"]


@pytest.mark.parametrize("case", GOLDEN, ids=range(len(GOLDEN)))
def test_trajectory_is_that_of_a_recorded_gradscaler(case):
    names = ("init_scale", "growth_factor", "backoff_factor", "growth_interval")
    state = from_gradscaler(*(case[name] for name in names))
    first = case["first_run_is_finite"]
    alternating = itertools.cycle((first, not first))
    finite = np.array([f for f, n in zip(alternating, case["runs"]) for _ in range(n)])

    want = np.full(len(finite), case["init_scale"])
    for step, scale in case["changes"]:
        want[step:] = scale
    states = adjust_all(state, finite)

    factors = case["growth_factor"], case["backoff_factor"]
    if all(float(np.float32(factor)) == factor for factor in factors):
        np.testing.assert_array_equal(states.loss_scale, want)
    else:  # GradScaler multiplies in float64 and rounds: one rounding apart at each change
        rounding = 2.0**-23
        np.testing.assert_allclose(
            states.loss_scale, want, rtol=(1 + len(case["changes"])) * rounding
        )
    assert states.counter[-1] == case["last_growth_tracker"]


def test_the_recorded_gradscaler_reaches_both_ends_of_the_range():
    scales = [scale for case in GOLDEN for _, scale in case["changes"]]
    assert max(scales) >= LARGEST_POWER and min(scales) <= 2.0**-80
    assert max(sum(case["runs"]) for case in GOLDEN) >= 20_000


class MegatronScaler:
    """Megatron-LM's rule: overflows spend a budget, and only a growth refills it."""

    def __init__(self, scale, growth_interval, growth_factor, backoff_factor, minimum, hysteresis):
        self.scale, self.growth_interval = scale, growth_interval
        self.growth_factor, self.backoff_factor = growth_factor, backoff_factor
        self.minimum, self.hysteresis = minimum, hysteresis
        self.budget, self.good_steps = hysteresis, 0

    def update(self, finite):
        if not finite:
            self.good_steps = 0
            self.budget -= 1
            if self.budget <= 0:
                self.scale = max(self.scale * self.backoff_factor, self.minimum)
            return
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.good_steps = 0
            self.budget = self.hysteresis
            self.scale *= self.growth_factor


@pytest.mark.parametrize("hysteresis", [1, 2, 3])
@pytest.mark.parametrize("period", [1, 2, 4])
@settings(max_examples=25, deadline=None)
@given(finite=sequences)
def test_trajectory_with_hysteresis_is_that_of_megatron(hysteresis, period, finite):
    model = MegatronScaler(2.0**16, period, 2.0, 0.5, 4.0, hysteresis)
    state = jt.DynamicLossScale(
        2.0**16, period=period, backoff_factor=0.5, min_loss_scale=4.0, hysteresis=hysteresis
    )
    want = []
    for ok in finite:
        model.update(ok)
        want.append((model.scale, model.good_steps, max(model.budget, 0)))
    states = adjust_all(state, pad(finite))
    n = len(finite)
    assert np.asarray(states.loss_scale)[:n].tolist() == [scale for scale, _, _ in want]
    assert np.asarray(states.counter)[:n].tolist() == [steps for _, steps, _ in want]
    if hysteresis > 1:
        assert np.asarray(states.hysteresis_left)[:n].tolist() == [left for _, _, left in want]


class DeepSpeedScaler:
    """DeepSpeed's rule: a distance from the last overflow instead of a count of good steps."""

    def __init__(self, scale, window, minimum, hysteresis, consecutive):
        self.scale, self.window, self.minimum = scale, window, minimum
        self.hysteresis, self.consecutive = hysteresis, consecutive
        self.budget, self.step, self.last_overflow = hysteresis, 0, -1

    def update(self, finite):
        """Whether it raises, if told to, instead of what it does here."""
        raises = False
        if finite:
            between = self.step - self.last_overflow - 1  # without the first good step
            grows = between > 0 and between % self.window == 0
            if grows or self.consecutive:
                self.budget = self.hysteresis
            if grows:
                self.scale *= 2
        else:
            if self.budget > 1:
                self.budget -= 1
            else:
                raises = self.scale == self.minimum
                self.scale = max(self.scale / 2, self.minimum)
            self.last_overflow = self.step
        self.step += 1
        return raises


def lengthen_finite_runs(finite):
    """The steps with one more finite step before each run of them, and where each went."""
    longer, places = [], []
    for before, ok in zip([False, *finite], finite, strict=False):
        longer += [True] * (ok and not before)
        places.append(len(longer))
        longer.append(ok)
    return longer, places


@pytest.mark.parametrize("hysteresis,consecutive", [(1, False), (2, False), (3, True)])
@pytest.mark.parametrize("window", [1, 3])
@settings(max_examples=25, deadline=None)
@given(finite=sequences)
@example(finite=[False] * LENGTH)
@example(finite=[False, True] * (LENGTH // 2))
@example(finite=([False] * 8 + [True]) * 5)  # a budget refilled at the minimum
@example(finite=[True] * LENGTH)
def test_trajectory_is_that_of_deepspeed_which_does_not_count_a_runs_first_step(
    window, hysteresis, consecutive, finite
):
    model = DeepSpeedScaler(2.0**6, window, 4.0, hysteresis, consecutive)
    longer, places = lengthen_finite_runs(finite)
    raises, scales, budgets = zip(
        *((model.update(ok), model.scale, model.budget) for ok in longer), strict=True
    )
    state = jt.DynamicLossScale(
        2.0**6, period=window, min_loss_scale=4.0, hysteresis=hysteresis,
        consecutive_hysteresis=consecutive,
    )  # fmt: skip
    states = adjust_all(state, pad(finite))
    n = len(finite)
    assert np.asarray(states.loss_scale)[:n].tolist() == [scales[place] for place in places]
    if hysteresis > 1:  # theirs stops at 1, ours at 0; the next overflow backs off either way
        ours = np.maximum(np.asarray(states.hysteresis_left)[:n], 1)
        assert ours.tolist() == [budgets[place] for place in places]
    exhausted = [bool(state.exhausted), *np.asarray(states.exhausted)][:n]
    ends = [left and not ok for left, ok in zip(exhausted, finite, strict=True)]
    assert ends == [raises[place] for place in places]


def test_a_spent_budget_is_refilled_at_growth_or_by_any_finite_step():
    finite = [False, True, False, False, True, True, False]
    numbers: Any = {"period": 2, "hysteresis": 2, "min_loss_scale": 1.0}
    at_growth = jt.DynamicLossScale(64.0, **numbers)
    assert trajectory(at_growth, finite)[0].tolist() == [64, 64, 32, 16, 16, 32, 32]
    by_any = jt.DynamicLossScale(64.0, **numbers, consecutive_hysteresis=True)
    assert trajectory(by_any, finite)[0].tolist() == [64, 64, 64, 32, 32, 64, 64]
