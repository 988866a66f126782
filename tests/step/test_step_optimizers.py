"""Arguments that a step passes to optimizers, and optimizers that use them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import jmp_train as jt
from jmp_train import testing
from jmp_train.testing import assert_one_compilation

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(32, 4)).astype(np.float32), RNG.normal(size=32).astype(np.float32)
BATCH = {"x": X, "y": Y}
PARAMS = {"w": jnp.zeros(4)}


def loss_fn(params, batch):
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]).astype(jnp.float32) ** 2)


def by_hand(optimizer, steps):
    """The same in a loop of Optax's own."""
    params, state = PARAMS, optimizer.init(PARAMS)
    value_fn = lambda params: loss_fn(params, BATCH)
    for _ in range(steps):
        value, grad = jax.value_and_grad(value_fn)(params)
        updates, state = optax.with_extra_args_support(optimizer).update(
            grad, state, params, value=value, grad=grad, value_fn=value_fn
        )
        params = optax.apply_updates(params, updates)
    return params["w"]


def plateau():
    return optax.chain(optax.sgd(0.5), contrib.reduce_on_plateau(factor=0.5, patience=1, rtol=0.5))


@pytest.mark.parametrize(
    "make",
    [
        plateau,
        lambda: optax.polyak_sgd(max_learning_rate=0.3),
        lambda: contrib.momo(0.3),
        lambda: contrib.momo_adam(0.3),
        pytest.param(optax.lbfgs, marks=pytest.mark.slow),
        lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(15)),
        lambda: optax.adam(0.1),
    ],
    ids=["reduce_on_plateau", "polyak_sgd", "momo", "momo_adam", "lbfgs", "backtracking", "adam"],
)
@pytest.mark.parametrize("micro_batches", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_step_gives_optimizers_what_a_hand_written_loop_does(make, micro_batches):
    steps = 6
    stepper = jt.make_step(loss_fn, make(), micro_batches=micro_batches)
    state = stepper.init(PARAMS)
    with assert_one_compilation(stepper.step) as step:
        for _ in range(steps):
            state, _ = step(state, BATCH)
    # Another order of the sums over 32 examples; a line search amplifies it near the minimum.
    np.testing.assert_allclose(state.params["w"], by_hand(make(), steps), rtol=2e-4, atol=2e-6)


@testing.policies("mixed_float16", "mixed_bfloat16")
def test_lbfgs_reaches_the_least_squares_solution_in_half_precision(policy):
    exact = np.linalg.lstsq(np.float64(X), np.float64(Y), rcond=None)[0]
    stepper = jt.make_step(loss_fn, optax.lbfgs(), policy)
    state = stepper.init(PARAMS)
    for _ in range(15):
        state, info = stepper.step(state, BATCH)
    # 32 inputs rounded by up to 2^-9 (bfloat16) move the solution by about as much.
    np.testing.assert_allclose(state.params["w"], exact, atol=2.0**-7)
    assert float(info.loss) < 1.01 * np.mean((X @ exact - Y) ** 2) + 2.0**-8


def test_value_fn_is_differentiated_under_the_loss_scale():
    # Gradients of 2^-26 are zero in float16, whose smallest number is 2^-24.
    seen = []

    def look(updates, state, params=None, *, value, grad, value_fn, **_):
        own_grad = jax.grad(value_fn)(params)
        seen.append(jax.tree.structure(own_grad))
        return jax.tree.map(lambda a, b: a / b - 1, own_grad, grad), state

    spying = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), look)
    stepper = jt.make_step(
        lambda params, batch: jnp.sum((params["w"] * batch).astype(jnp.float32)) * 2.0**-26,
        spying,
        "mixed_float16",
        loss_scale=jt.StaticLossScale(2.0**16),
    )
    state, info = stepper.step(stepper.init(PARAMS), jnp.ones(4))
    np.testing.assert_array_equal(state.params["w"], 0)  # equal gradients, and none is 0 / 0
    assert info.finite and set(seen) == {jax.tree.structure(PARAMS)}


def test_an_optimizer_that_needs_other_arguments_is_refused_by_their_names():
    def update(updates, state, params=None, *, hessian, **_):
        return updates, state

    needy = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    stepper = jt.make_step(loss_fn, optax.chain(optax.clip(1.0), needy))
    with pytest.raises(TypeError, match="needs 'hessian'; .* value, grad and value_fn"):
        stepper.step(stepper.init(PARAMS), BATCH)


FLOAT8 = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]


def linear(params, batch):
    return jnp.sum((params["w"] * batch).astype(jnp.float32))


@pytest.mark.parametrize("dtype", [*FLOAT8, "bfloat16", "float16"])
def test_narrow_parameters_train_with_their_moving_average(dtype):
    policy = f"params={dtype},compute=bfloat16,output=float32"
    stepper = jt.make_step(linear, optax.sgd(0.25), policy, ema_decay=0.5)
    first = np.array([1.0, -0.5, 0.25, 2.0], np.float32)  # exact in each
    gradient = np.array([1.375, 3.25, -0.59375, 0.181640625], np.float32)  # exact in bfloat16
    state, _ = stepper.step(stepper.init({"w": first}), gradient)
    assert state.params["w"].dtype == dtype and state.ema["w"].dtype == jnp.float32
    # One rounding of the float32 sum to nearest, by ml_dtypes; an average over (1 + 0) / (10 + 0).
    want = (first - np.float32(0.25) * gradient).astype(dtype)
    np.testing.assert_array_equal(np.asarray(state.params["w"]), want)
    average = first + 0.9 * (want.astype(np.float32) - first)
    np.testing.assert_allclose(state.ema["w"], average, rtol=4 * 2.0**-24)


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrap", [jt.optim.master_weights, jt.optim.stochastic_rounding, jt.optim.kahan]
)
@pytest.mark.parametrize("dtype", FLOAT8[:2])
def test_float8_parameters_keep_small_updates_under_the_wrappers(wrap, dtype):
    policy = f"params={dtype},compute=float32,output=float32"
    stepper = jt.make_step(linear, wrap(optax.sgd(2.0**-7)), policy, ema_decay=0.9)
    state = stepper.init({"w": jnp.full(4096, 1.0)})
    for _ in range(64):  # each below half a spacing; together 0.5
        state, _ = stepper.step(state, jnp.ones(4096))
    assert state.params["w"].dtype == dtype
    mean = np.asarray(state.params["w"]).astype(np.float32).mean()
    np.testing.assert_allclose(mean, 0.5, atol=0.05)  # stochastic: 4,096 of deviation below 0.5


def test_float8_parameters_that_optax_adds_to_stand_still():
    # The purpose of the wrappers: an update below half a spacing of float8 is lost.
    policy = "params=float8_e4m3fn,compute=float32,output=float32"
    stepper = jt.make_step(linear, optax.sgd(2.0**-7), policy)
    state = stepper.init({"w": jnp.ones(3)})
    for _ in range(64):
        state, _ = stepper.step(state, jnp.ones(3))
    np.testing.assert_array_equal(np.asarray(state.params["w"]).astype(np.float32), 1)
