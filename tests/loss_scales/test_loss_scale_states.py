"""A loss scale scales in float32 and survives every pytree operation."""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from absl.testing import parameterized
from helpers.loss_scales import (
    fields,
    with_and_without_jit,
)

import jmp_train as jt
from jmp_train.loss_scales.states import largest_power_of_two
from jmp_train.records.checkpoints import Checkpoints


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
    def test_scaling_skips_non_numbers_and_scales_complex(self, kind):
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
