"""An optimizer under `loss_scaling` trains as `make_step` does, and a skipped step changes nothing."""

import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import jmp_train as jt
from jmp_train.optim import LossScalingState
from jmp_train.testing import assert_same_bits

INF = jnp.float32(jnp.inf)


def assert_close(a, b):
    chex.assert_trees_all_equal_shapes_and_dtypes(a, b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        unit = jnp.finfo(x.dtype).eps if jnp.issubdtype(x.dtype, jnp.floating) else 0
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=0, atol=8 * float(unit) * np.abs(y).max())


def state_of(opt_state) -> Any:
    return optax.tree.get(opt_state, "LossScalingState")


# Training.


def loss_fn(params, batch):
    out = jnp.tanh(batch["x"] @ params["in"]) @ params["out"]
    return jnp.mean((out.astype(jnp.float32) - batch["y"]) ** 2)


def clipped_adamw():
    schedule = optax.piecewise_constant_schedule(0.25, {4: 0.5, 8: 0.25})
    return optax.chain(optax.clip_by_global_norm(0.3), optax.adamw(schedule))


@pytest.mark.parametrize(
    "policy,inner",
    [
        ("mixed_float16", clipped_adamw()),
        ("float16", jt.optim.master_weights(clipped_adamw())),
    ],
    ids=["mixed", "master_weights"],
)
def test_custom_loop_matches_make_step(policy, inner):
    """Scales and counts to the bit. The numbers are the same to the bit under `jax.disable_jit`, which
    takes 20 s; compiled, make_step's update lies in a cond on a CPU and this one's is selected, and
    they differ by 2 to 3 units in the last place of a leaf's largest number; 8 are allowed."""
    loss_scale = jt.DynamicLossScale(2.0**19, period=3)
    rng = np.random.default_rng(0)
    params = {"in": rng.normal(size=(5, 4)), "out": rng.normal(size=(4, 2))}
    params = jax.tree.map(jnp.float32, params)
    stepper = jt.make_step(loss_fn, inner, policy, loss_scale=loss_scale)
    want = stepper.init(params)

    cast = jt.get_policy(policy)
    optimizer = jt.optim.loss_scaling(inner, loss_scale)
    params = cast.cast_to_param(params)
    opt_state = optimizer.init(params)

    @chex.assert_max_traces(n=1)
    def step(params, opt_state, batch):
        def scaled(params):
            loss = loss_fn(cast.cast_to_compute(params), cast.cast_to_compute(batch))
            return jt.optim.scale_loss(loss, opt_state)

        grads = jax.grad(scaled)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    chex.clear_trace_counter()
    step = jax.jit(step, donate_argnums=(0, 1))
    scales = []
    for n in range(18):
        x = rng.normal(size=(8, 5)).astype(np.float32)
        x[0, 0] = np.inf if n == 9 else x[0, 0]
        batch = {"x": x, "y": np.ones((8, 2), np.float32)}
        want, _ = stepper.step(want, batch)
        params, opt_state = step(params, opt_state, batch)
        assert_close((params, opt_state.inner), (want.params, want.opt_state))
        assert_same_bits(opt_state[:3], (want.loss_scale, want.skipped, want.skipped_in_row))
        scales.append(float(opt_state.loss_scale.loss_scale))
    ratios = {b / a for a, b in itertools.pairwise(scales)}
    assert ratios == {0.5, 1.0, 2.0} and opt_state.skipped >= 3  # all that can happen happened


def test_gradients_are_unscaled_before_they_are_clipped():
    optimizer = jt.optim.loss_scaling(
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)), jt.DynamicLossScale(2.0**10)
    )
    params = jnp.zeros(2)
    for grads, want in (([3.0, 4.0], [-0.6, -0.8]), ([0.3, 0.4], [-0.3, -0.4])):
        scaled = jnp.asarray(grads) * 2.0**10
        updates, _ = optimizer.update(scaled, optimizer.init(params), params)
        np.testing.assert_allclose(updates, want, rtol=3e-7)  # a norm and a division in float32


def test_float16_gradients_are_unscaled_in_float32():
    optimizer = jt.optim.loss_scaling(optax.sgd(1.0), jt.DynamicLossScale(2.0**16))
    smallest = jnp.float16(2.0**-24)
    updates, _ = optimizer.update(smallest, optimizer.init(smallest), smallest)
    assert updates.dtype == jnp.float32 and updates == -(2.0**-40)


def test_what_update_is_told_reaches_the_inner_optimizer():
    def update(updates, state, params=None, *, value):
        return updates * value, state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    optimizer = jt.optim.loss_scaling(inner, jt.StaticLossScale(4.0))
    updates, _ = optimizer.update(jnp.ones(1), optimizer.init(jnp.ones(1)), value=jnp.float32(3))
    assert updates == 0.75


def test_narrow_parameters_are_left_to_the_inner_optimizer_that_takes_them():
    """So that `fp32_state`, and `make_step` with it, hands on the parameters as they are."""
    for inner, as_it_is in (
        (jt.optim.master_weights(optax.sgd(1.0)), True),
        (optax.sgd(1.0), False),
    ):
        optimizer = jt.optim.loss_scaling(inner)
        assert (jt.optim.fp32_state(optimizer) is optimizer) == as_it_is


# Skipped steps.


@pytest.mark.parametrize("bad", [jnp.inf, -jnp.inf, jnp.nan])
def test_a_skipped_step_changes_nothing_but_the_scale_and_the_counts(bad):
    optimizer = jt.optim.loss_scaling(clipped_adamw(), jt.DynamicLossScale(8.0))
    params = {"w": jnp.array([0.0, -0.0, 1.5, -3e38, 1e-30]), "b": jnp.float32(-0.0)}
    good = jax.tree.map(jnp.ones_like, params)
    before = optimizer.update(good, optimizer.init(params), params)[1]
    grads = {"w": good["w"].at[3].set(bad), "b": good["b"]}
    updates, after = jax.jit(optimizer.update)(grads, before, params)
    assert_same_bits(jax.jit(optax.apply_updates)(params, updates), params)
    assert_same_bits(optax.apply_updates(params, updates), params)
    assert_same_bits(after.inner, before.inner)
    assert (after.skipped, after.skipped_in_row, after.loss_scale.loss_scale) == (1, 1, 4.0)
    _, then = optimizer.update(good, after, params)
    assert (then.skipped, then.skipped_in_row) == (1, 0)


@pytest.mark.parametrize("way", [lambda o: o, jt.optim.master_weights])
@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16])
def test_skipped_step_changes_no_16_bit_parameter(half, way):
    bits = np.arange(2**16, dtype=np.uint16)
    number = bits.view(half).astype(np.float32)
    # A sum makes any NaN the quiet one, and a CPU flushes float32's subnormals, some of bfloat16's.
    stays = ~np.isnan(number) & ((number == 0) | (np.abs(number) >= np.finfo(np.float32).tiny))
    if way is jt.optim.master_weights:
        stays = np.ones_like(stays)
    params = jnp.asarray(bits.view(half))
    optimizer = jt.optim.loss_scaling(way(optax.sgd(1.0)))
    updates, _ = optimizer.update(jnp.full(2**16, INF), optimizer.init(params), params)
    after = np.asarray(jax.jit(optax.apply_updates)(params, updates)).view(np.uint16)
    np.testing.assert_array_equal(after[stays], bits[stays])


def test_apply_if_finite_differs_in_what_its_docstring_says():
    params = jnp.float32(-0.0)
    theirs = optax.apply_if_finite(optax.sgd(1.0), max_consecutive_errors=1)
    updates, state = theirs.update(INF, theirs.init(params), params)
    assert np.signbit(params) and not np.signbit(optax.apply_updates(params, updates))
    assert theirs.update(INF, state, params)[0] == -jnp.inf  # the second is let through


def test_the_counts_of_skipped_steps_stop_at_the_top_of_int32():
    optimizer = jt.optim.loss_scaling(optax.sgd(1.0))
    top = jnp.int32(2**31 - 1)
    state = optimizer.init(INF)._replace(skipped=top, skipped_in_row=top)
    _, state = optimizer.update(INF, state)
    assert state.skipped == top and state.skipped_in_row == top


@pytest.mark.parametrize("loss_scale", [jt.NoOpLossScale(), jt.StaticLossScale(4.0)])
def test_a_constant_scale_skips_too_and_stays(loss_scale):
    optimizer = jt.optim.loss_scaling(optax.sgd(1.0), loss_scale)
    state = optimizer.init(jnp.zeros(2))
    scaled = jt.optim.scale_loss(jnp.ones(2), state)
    updates, state = jax.jit(optimizer.update)(scaled, state)
    np.testing.assert_array_equal(updates, [-1, -1])
    updates, state = jax.jit(optimizer.update)(scaled * INF, state)
    np.testing.assert_array_equal(updates, [0, 0])
    assert state.loss_scale == loss_scale and state.skipped == 1


# With other transformations.


def test_around_multi_steps_a_micro_batch_that_is_not_finite_is_left_out():
    inner = optax.MultiSteps(optax.sgd(1.0), every_k_schedule=2)
    optimizer = jt.optim.loss_scaling(inner, jt.DynamicLossScale(4.0))  # pyright: ignore[reportArgumentType]
    params = jnp.zeros(1)
    state = optimizer.init(params)
    total = params
    for micro_batch in (1.0, jnp.inf, 3.0):
        grads = jt.optim.scale_loss(jnp.full(1, micro_batch), state)
        updates, state = optimizer.update(grads, state, params)
        total += updates
    assert total == -2.0  # the mean of 1 and 3, though the scale fell from 4 to 2 between them
    assert state.skipped == 1 and state.inner.gradient_step == 1


def test_inside_multi_steps_every_step_after_a_bad_micro_batch_is_skipped():
    """Why the documentation says never: if Optax mends it, the advice can go."""
    optimizer = optax.MultiSteps(
        jt.optim.loss_scaling(optax.sgd(1.0), jt.DynamicLossScale(4.0)), every_k_schedule=2
    )
    params = jnp.zeros(1)
    state = optimizer.init(params)
    totals = []
    for micro_batch in (1.0, 3.0, jnp.inf, 3.0, 1.0, 3.0):
        grads = jt.optim.scale_loss(jnp.full(1, micro_batch), state)
        updates, state = optimizer.update(grads, state, params)
        totals.append(float(updates[0]))
    assert totals == [0.0, -2.0, 0.0, 0.0, 0.0, 0.0]
    assert (state_of(state).skipped, state_of(state).loss_scale.loss_scale) == (2, 1.0)
    assert jnp.isnan(state.acc_grads).all()


def test_the_scale_is_found_at_any_depth():
    scaling = jt.optim.loss_scaling(optax.adam(1.0), jt.DynamicLossScale(2.0**5))
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    for optimizer in (
        scaling,
        optax.chain(optax.identity(), optax.chain(scaling)),
        optax.partition({"x": scaling, "y": optax.set_to_zero()}, {"a": "x", "b": "y"}),
        optax.MultiSteps(scaling, 2),
        optax.inject_hyperparams(
            lambda rate: jt.optim.loss_scaling(optax.sgd(rate), jt.StaticLossScale(32))
        )(rate=1.0),
    ):
        state = optimizer.init(params)
        assert isinstance(state_of(state), LossScalingState)
        assert jax.jit(jt.optim.scale_loss)(jnp.float16(3.0), state) == 96.0


def test_a_state_with_no_scale_or_two_is_refused():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    with pytest.raises(ValueError, match="has 0 loss scales; expected one"):
        jt.optim.scale_loss(1.0, optax.adam(1.0).init(params))
    each = {name: jt.optim.loss_scaling(optax.sgd(1.0)) for name in params}
    two = optax.partition(each, {"a": "a", "b": "b"}).init(params)
    with pytest.raises(ValueError, match="has 2 loss scales; .* around the whole optimizer"):
        jt.optim.scale_loss(1.0, two)
