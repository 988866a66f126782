"""Loss scales follow GradScaler, jmp, Flax, Megatron-LM and DeepSpeed, and survive every pytree
operation."""

import dataclasses
import itertools
import json
import math
import warnings
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import example, given, settings
from hypothesis import strategies as st
from make_gradscaler_trajectories import PATH, gradscaler_trajectory

import jmp_train as jt
from jmp_train.loss_scales.states import largest_power_of_two
from jmp_train.runs.checkpoints import Checkpoints

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


# Trajectories against the peers.


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
@pytest.mark.parametrize("factor,backoff", [(2.0, 0.5), (4.0, 0.25), (1.5, 0.75)])
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


# Limits and numbers.


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


class ScaleTest(chex.TestCase):
    @with_and_without_jit
    @parameterized.parameters(jt.StaticLossScale, jt.DynamicLossScale)
    def test_a_float16_loss_of_three_times_65536_does_not_overflow(self, kind):
        scaled = self.variant(lambda loss: kind(2.0**16).scale(loss))(jnp.float16(3))
        assert scaled.dtype == jnp.float32 and scaled == 3 * 2.0**16

    @with_and_without_jit
    @parameterized.product(kind=(jt.StaticLossScale, jt.DynamicLossScale), exponent=(-9, 0, 16, 40))
    def test_unscaling_by_a_power_of_two_is_exact(self, kind, exponent):
        g = np.random.default_rng(0).normal(size=1000).astype(np.float32)
        loss_scale = kind(2.0**exponent)
        scaled = self.variant(loss_scale.scale)({"g": g})
        np.testing.assert_array_equal(scaled["g"], np.ldexp(g, exponent))
        np.testing.assert_array_equal(self.variant(loss_scale.unscale)(scaled)["g"], g)

    @with_and_without_jit
    @parameterized.parameters(np.float16, ml_dtypes.bfloat16)
    def test_half_gradients_are_unscaled_in_float32(self, half):
        smallest = np.array(1, np.uint16).view(half)  # a subnormal, which no smaller half follows
        out = self.variant(jt.DynamicLossScale(2.0**7).unscale)(np.array([0.5, 3], half) + smallest)
        assert out.dtype == jnp.float32
        want = (np.array([0.5, 3], half) + smallest).astype(np.float64) / 2.0**7
        np.testing.assert_array_equal(out, want)

    @with_and_without_jit
    @parameterized.parameters(jt.StaticLossScale, jt.DynamicLossScale)
    def test_scaling_leaves_what_is_no_number_and_scales_complex(self, kind):
        tree = {"i": jnp.int32(3), "b": jnp.array(True), "k": jax.random.key(1), "n": None}
        out = self.variant(kind(4.0).scale)(tree | {"c": jnp.complex64(1 + 2j)})
        assert out["i"] == 3 and bool(out["b"]) and out["n"] is None
        assert bool(out["k"] == tree["k"])
        assert out["c"] == 4 + 8j and out["c"].dtype == jnp.complex64
        assert self.variant(kind(4.0).unscale)(out)["c"] == 1 + 2j

    @with_and_without_jit
    @parameterized.parameters("float8_e4m3fn", "float8_e5m2")
    def test_8_bit_leaves_are_scaled_in_float32(self, name):
        x = jnp.array([0.5, 2.0], getattr(jnp, name))
        scaled = self.variant(jt.DynamicLossScale(2.0**10).scale)(x)
        assert scaled.dtype == jnp.float32
        np.testing.assert_array_equal(scaled, [512, 2048])
        np.testing.assert_array_equal(self.variant(jt.StaticLossScale(2.0).unscale)(x), [0.25, 1])

    @with_and_without_jit
    def test_no_scale_leaves_everything(self):
        tree = {"g": jnp.float16(3)}
        assert self.variant(jt.NoOpLossScale().scale)(tree)["g"].dtype == jnp.float16
        assert self.variant(jt.NoOpLossScale().unscale)(tree)["g"] == 3


# Pytrees.


def unusual():
    """A state in which no field has its default."""
    return jt.DynamicLossScale(
        loss_scale=jnp.float32(48.0),
        counter=jnp.int32(1),
        period=7,
        factor=3.0,
        min_loss_scale=0.125,
        backoff_factor=0.25,
        max_loss_scale=2.0**20,
        hysteresis=4,
        hysteresis_left=jnp.int32(2),
        consecutive_hysteresis=True,
    )


def fields(state):
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def test_the_unusual_state_differs_from_the_default_in_every_field():
    default = fields(jt.DynamicLossScale(1.0))
    assert all(default[name] != value for name, value in fields(unusual()).items())


@pytest.mark.parametrize(
    "passage",
    [
        jax.jit(lambda s: s),
        lambda s: jax.tree.map(lambda x: x, s),
        lambda s: jax.tree.unflatten(*reversed(jax.tree.flatten(s))),
        lambda s: jax.lax.scan(lambda c, _: (c, None), s, None, length=2)[0],
        lambda s: jax.lax.cond(True, lambda c: c, lambda c: c, s),
        lambda s: jax.tree.map(jnp.asarray, jax.device_get(s)),
        lambda s: jax.tree.map(lambda x: x[0], jax.vmap(lambda _: s)(jnp.arange(2))),
    ],
    ids=["jit", "tree_map", "flatten", "scan", "cond", "device", "vmap"],
)
def test_every_field_survives(passage):
    assert fields(passage(unusual())) == fields(unusual())


STATIC = jt.DynamicLossScale._STATIC


@pytest.mark.parametrize(
    "state",
    [unusual(), jt.StaticLossScale(1000.1), jt.NoOpLossScale()],
    ids=["dynamic", "static", "none"],
)
def test_a_checkpoint_through_orbax_holds_every_bit(tmp_path, state):
    if isinstance(state, jt.DynamicLossScale):
        state = dataclasses.replace(state, loss_scale=jnp.float32(1 / 3))
    saved = {"loss_scale": state, "step": jnp.int32(1)}  # Orbax wants an array in a state
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, saved, extra={}, metrics=None)
    checkpoints.wait()
    other = jax.tree.map(jnp.zeros_like, saved)
    restored = checkpoints.restore_latest(other)
    checkpoints.close()
    assert restored is not None
    after = restored.state["loss_scale"]
    assert type(after) is type(state) and fields(after) == fields(state)
    chex.assert_trees_all_equal_dtypes(after, state)


@pytest.mark.parametrize("leaf", [object(), None, "x", jax.ShapeDtypeStruct((), jnp.float32)])
def test_leaves_may_be_anything_and_the_static_fields_stay(leaf):
    state = jax.tree.map(lambda _: leaf, unusual())
    before, after = fields(unusual()), fields(state)
    assert all(after[name] == before[name] for name in STATIC)
    assert all(after[name] is leaf for name in set(after) - set(STATIC))


def test_eval_shape_keeps_every_static_field():
    shapes = jax.eval_shape(lambda s: s.adjust(True), unusual())
    assert all(getattr(shapes, name) == getattr(unusual(), name) for name in STATIC)
    assert shapes.loss_scale.dtype == jnp.float32 and shapes.counter.dtype == jnp.int32
    assert shapes.hysteresis_left.dtype == jnp.int32


def test_leaves_are_the_scale_the_counter_and_the_budget_under_their_names():
    def names(state):
        paths = jax.tree_util.tree_leaves_with_path(state)
        return [jax.tree_util.keystr(path, simple=True) for path, _ in paths]

    assert names(jt.DynamicLossScale(1.0)) == ["loss_scale", "counter"]
    assert names(unusual()) == ["loss_scale", "counter", "hysteresis_left"]


@pytest.mark.parametrize("state", [jt.NoOpLossScale(), jt.StaticLossScale(8.0)])
def test_constant_scales_have_no_leaves_and_pass_through_jit(state):
    assert jax.tree.leaves(state) == []
    assert jax.jit(lambda s: s)(state) == state
    assert jax.jit(lambda s, ok: s.adjust(ok))(state, False) == state
    assert jax.tree.map(lambda x: x, state) == state
    assert hash(state) == hash(dataclasses.replace(state))


def test_nothing_recompiles_when_the_scale_or_the_counter_changes():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(state, finite):
        return state.adjust(finite)

    chex.clear_trace_counter()
    for start in (2.0**15, np.float32(3), np.float64(5), jnp.float32(7), jnp.asarray(9.0), 2**4):
        state = jt.DynamicLossScale(start, period=2)
        for finite in (True, True, False, True):
            state = step(state, jnp.array(finite))
    state = step(jt.DynamicLossScale(2.0, 1, 2), jnp.array(True))
    assert (state.loss_scale, state.counter) == (4, 0)


class AdjustTest(chex.TestCase):
    @partial(with_and_without_jit, with_device=True, without_device=True)
    def test_the_next_state_is_float32_and_int32_whatever_the_first_was_made_of(self):
        for scale, counter in (
            (2.0, 0),
            (np.float64(2), np.int32(0)),
            (jnp.float16(2), jnp.int32(0)),
        ):
            state = self.variant(lambda s: s.adjust(True))(jt.DynamicLossScale(scale, counter, 1))
            assert state.loss_scale.dtype == jnp.float32 and state.counter.dtype == jnp.int32
            assert (state.loss_scale, state.counter) == (4, 0)


def test_adjust_takes_a_scalar():
    with pytest.raises(AssertionError, match="expected boolean scalar"):
        jt.DynamicLossScale(1.0).adjust(jnp.array([True]))


def test_a_float64_scale_stays_float64():
    with jax.enable_x64(True):
        state = jt.DynamicLossScale(jnp.float64(2.0**200), period=1).adjust(True)
        assert state.loss_scale.dtype == jnp.float64 and state.loss_scale == 2.0**201


@pytest.mark.parametrize(
    "dtype,largest",
    [
        ("float8_e4m3fn", 256.0),
        ("float8_e5m2", 2.0**15),
        ("float16", 2.0**15),
        ("bfloat16", 2.0**127),
        ("float32", 2.0**127),
        ("float64", 2.0**1023),
    ],
)
def test_the_largest_power_of_two_of_a_format(dtype, largest):
    assert largest_power_of_two(getattr(jnp, dtype)) == largest
    with np.errstate(over="ignore"):  # the next is not representable
        assert np.dtype(getattr(ml_dtypes, dtype, dtype)).type(largest) == largest


# Validation.

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


# all_finite and select_tree.


class AllFiniteTest(chex.TestCase):
    @with_and_without_jit
    @parameterized.parameters(
        "float16", "bfloat16", "float32", "complex64",
        "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
    )  # fmt: skip
    def test_one_bad_element_anywhere_is_found(self, name):
        dtype = getattr(jnp, name)
        all_finite = self.variant(jt.all_finite)
        good = jnp.ones((3, 4), dtype)
        bad = [jnp.nan] if name in FINITE_ONLY else [jnp.nan, jnp.inf, -jnp.inf]
        assert all_finite({"a": good, "b": [good]})
        for value in bad:
            assert not all_finite({"a": good, "b": [good.at[2, 3].set(value)]})
            assert not all_finite({"a": good.at[0, 0].set(value), "b": [good]})

    @with_and_without_jit
    def test_what_cannot_be_infinite_is_finite(self):
        tree = {"i": jnp.arange(3), "b": jnp.array([True]), "k": jax.random.key(0), "n": None}
        assert self.variant(jt.all_finite)(tree)
        assert self.variant(jt.all_finite)({"empty": jnp.zeros((0, 3))})

    @with_and_without_jit
    def test_an_infinite_imaginary_part_is_found(self):
        z = jnp.array([1 + 1j, complex(0, math.inf)], jnp.complex64)
        assert not self.variant(jt.all_finite)(z)

    @with_and_without_jit
    @parameterized.parameters(np.float16, ml_dtypes.bfloat16)
    def test_every_16_bit_pattern_is_judged_as_numpy_does(self, half):
        values = np.arange(2**16, dtype=np.uint16).view(half)
        got = self.variant(jax.vmap(jt.all_finite))(jnp.asarray(values))
        np.testing.assert_array_equal(got, np.isfinite(values.astype(np.float32)))


FINITE_ONLY = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2fnuz")


def test_trees_without_arrays_are_finite_and_python_numbers_count():
    assert jt.all_finite(None) and jt.all_finite({}) and jt.all_finite({"s": "text", "i": 3})
    assert not jt.all_finite({"x": math.nan}) and not jt.all_finite({"x": complex(math.inf)})
    assert jt.all_finite(()).shape == () and jt.all_finite(()).dtype == jnp.bool_


class SelectTest(chex.TestCase):
    @with_and_without_jit
    @parameterized.product(pred=(True, False), name=("float16", "bfloat16"))
    def test_every_16_bit_pattern_is_selected_bit_by_bit(self, pred, name):
        # Through float32 on a CPU, bfloat16 NaNs lose their payload: those are compared as NaNs.
        on_true = np.arange(2**16, dtype=np.uint16)
        on_false = on_true[::-1].copy()
        out = self.variant(jt.select_tree)(
            jnp.array(pred),
            jnp.asarray(on_true.view(getattr(jnp, name))),
            jnp.asarray(on_false.view(getattr(jnp, name))),
        )
        out, want = np.asarray(out), (on_true if pred else on_false)
        nan = np.isnan(want.view(out.dtype).astype(np.float32)) & (name == "bfloat16")
        np.testing.assert_array_equal(out.view(np.uint16)[~nan], want[~nan])
        assert np.isnan(out[nan].astype(np.float32)).all()

    @with_and_without_jit
    @parameterized.parameters(True, False)
    def test_any_tree_of_arrays_is_selected(self, pred):
        bits = np.array([0x7FC12345, 0xFF812345, 0x80000000, 1], np.uint32)  # NaNs, -0, subnormal

        def tree(i):
            return {
                "f": jnp.asarray(np.roll(bits, i).view(np.float32)),
                "i": jnp.array([i, 2**31 - 1 - i], jnp.int32),
                "b": jnp.array(bool(i)),
                "c": jnp.complex64(complex(-0.0, i)),
                "key": jax.random.split(jax.random.key(i), 2),
                "fp8": jnp.array(i, jnp.float8_e4m3fn),
                "n": None,
            }

        out = self.variant(jt.select_tree)(jnp.array(pred), tree(0), tree(1))
        want = tree(0 if pred else 1)
        assert jax.tree.structure(out) == jax.tree.structure(want)
        for name in want:
            if name == "key":
                assert bool((out["key"] == want["key"]).all())
            elif name != "n":
                assert out[name].dtype == want[name].dtype
                assert np.asarray(out[name]).tobytes() == np.asarray(want[name]).tobytes()


def test_select_takes_a_boolean_scalar_only():
    for pred in (jnp.array([True]), jnp.array(1), jnp.array(1.0)):
        with pytest.raises(AssertionError, match="expected boolean scalar"):
            jt.select_tree(pred, None, None)


def test_select_refuses_trees_that_differ():
    with pytest.raises(ValueError):
        jt.select_tree(True, {"a": jnp.ones(2)}, {"b": jnp.ones(2)})
    with pytest.raises(TypeError):
        jt.select_tree(True, jnp.ones(2), jnp.ones(2, jnp.bfloat16))
