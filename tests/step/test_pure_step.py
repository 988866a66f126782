"""The step as a function: differentiated, mapped, and free of donation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmp_train as jt
from jmp_train import testing


def loss_fn(params, batch):
    return 0.5 * jnp.sum((batch["a"] * params["w"]).astype(jnp.float32) ** 2)


@testing.policies("float32", "mixed_float16", "mixed_bfloat16")
def test_a_gradient_goes_through_two_steps_of_training(policy):
    # w becomes w (1 - r a^2) at each step, so the last loss is a^2 w^2 (1 - r a^2)^4 / 2 and its
    # derivative by w is a^2 w (1 - r a^2)^4. The numbers are exact in half precision but for the
    # products with 1 - r a^2, which are rounded at each use.
    stepper = jt.make_step(
        loss_fn, optax.sgd(0.25), policy,
        loss_scale=jt.DynamicLossScale(2.0**4) if policy == "mixed_float16" else None,
    )  # fmt: skip
    batch = {"a": jnp.array([1.0, 0.5, 1.5])}
    before = stepper.init({"w": jnp.array([1.0, 2.0, -0.5])})

    def last_loss(params):
        state = before._replace(params=params)
        for _ in range(2):
            state, _ = stepper.pure_step(state, batch)
        return loss_fn(state.params, batch)

    a2, w = np.float64(batch["a"]) ** 2, np.float64(before.params["w"])
    exact = a2 * w * (1 - 0.25 * a2) ** 4
    for grad in (jax.grad(last_loss), jax.jit(jax.grad(last_loss))):
        got = grad(before.params)["w"]
        rounding = {"float32": 2.0**-22, "mixed_float16": 2.0**-8, "mixed_bfloat16": 2.0**-5}
        np.testing.assert_allclose(got, exact, rtol=rounding[policy])


def test_the_pure_step_is_the_jitted_one_and_donates_nothing():
    stepper = jt.make_step(loss_fn, optax.adam(0.1), "mixed_float16")
    state, batch = stepper.init({"w": jnp.ones(3)}), {"a": jnp.ones(3)}
    pure, info = jax.jit(stepper.pure_step)(state, batch)
    assert not any(x.is_deleted() for x in jax.tree.leaves(state))
    donated, other = stepper.step(state, batch)
    chex.assert_trees_all_equal(pure, donated)
    chex.assert_trees_all_equal(info, other)


@pytest.mark.slow
def test_states_are_trained_side_by_side_under_vmap():
    scale = jt.DynamicLossScale(2.0**4)
    stepper = jt.make_step(loss_fn, optax.adam(0.1), "mixed_float16", loss_scale=scale)
    batch = {
        "a": jnp.full(3, 300.0)
    }  # a gradient of 300^2 w times the scale: one does not overflow
    starts = [{"w": jnp.full(3, w)} for w in (1e-3, 1.0, 2.0)]
    states = jax.tree.map(lambda *x: jnp.stack(x), *map(stepper.init, starts))
    states, infos = jax.vmap(stepper.pure_step, in_axes=(0, None))(states, batch)
    for n, start in enumerate(starts):
        one, info = stepper.step(stepper.init(start), batch)
        assert bool(infos.finite[n]) == bool(info.finite)
        chex.assert_trees_all_close(jax.tree.map(lambda x, n=n: x[n], states), one, rtol=1e-6)
    assert set(np.asarray(infos.finite).tolist()) == {True, False}


@pytest.mark.parametrize(
    "wrap",
    [
        jt.optim.master_weights,
        jt.optim.bf16_remainder,
        jt.optim.kahan,
        jt.optim.stochastic_rounding,
    ],
)
def test_a_derivative_through_bit_updates_is_refused(wrap):
    # Of bit patterns it would be zero.
    stepper = jt.make_step(loss_fn, wrap(optax.sgd(0.25)), "p=bf16,c=f32")
    before, batch = stepper.init({"w": jnp.ones(3)}), {"a": jnp.ones(3)}

    def after(params):
        return loss_fn(stepper.pure_step(before._replace(params=params), batch)[0].params, batch)

    with pytest.raises(TypeError, match="cannot be differentiated through an update"):
        jax.grad(after)(before.params)
