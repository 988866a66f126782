"""`assert_gradients_close`, against gradients in closed form."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jmp_train as jt
from jmp_train import testing
from jmp_train.testing import assert_gradients_close
from tests.helpers.arrays import through

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 8)).astype(np.float32)
Y = RNG.normal(size=(64, 3)).astype(np.float32)
PARAMS = {"w": RNG.normal(size=(8, 3)).astype(np.float32), "b": np.zeros(3, np.float32)}
BATCH = {"x": X, "y": Y}


def loss_fn(params, batch):
    out = (batch["x"] @ params["w"] + params["b"]).astype(jnp.float32)
    return jnp.mean(jnp.square(out - batch["y"].astype(jnp.float32)))


def failure(*args, **kwargs):
    with pytest.raises(AssertionError) as error:
        assert_gradients_close(*args, **kwargs)
    return str(error.value)


def rows(message):
    """Return the table: (cosine, relative error, norm) by parameter."""
    cells = [line.split() for line in message.splitlines()[2:]]
    return {name: tuple(map(float, numbers)) for name, *numbers in cells}


@testing.policies("float32", "mixed_float16", "mixed_bfloat16", "bfloat16")
def test_a_sound_loss_passes_with_the_default_bounds(policy):
    exact = "highest" if policy == "float32" else None  # a GPU may compute float32 products in TF32
    with jax.default_matmul_precision(exact):
        assert_gradients_close(loss_fn, PARAMS, BATCH, policy=policy)


def test_cosine_and_relative_error_are_those_of_the_closed_form():
    def half_of_the_gradient(params, batch):  # w gets half its gradient, b the opposite of its own
        w = (params["w"] + jax.lax.stop_gradient(params["w"])) / 2
        b = 2 * jax.lax.stop_gradient(params["b"]) - params["b"]
        exact = params["w"].dtype == jnp.float32
        return loss_fn(params if exact else {"w": w, "b": b}, batch)

    message = failure(half_of_the_gradient, PARAMS, BATCH, policy="mixed_bfloat16")
    residual = X.astype(np.float64) @ PARAMS["w"] - Y
    exact = {"w": 2 * X.T.astype(np.float64) @ residual / Y.size, "b": 2 * residual.sum(0) / Y.size}
    found = rows(message)
    assert list(found) == ["b", "w"]  # the worst first
    np.testing.assert_allclose(found["b"], (-1, 2, np.linalg.norm(exact["b"])), rtol=0.02)
    np.testing.assert_allclose(found["w"], (1, 0.5, np.linalg.norm(exact["w"])), rtol=0.02)
    assert "expected a cosine of at least 0.992157 and a relative error of at most 0.125" in message
    assert "found 2 of 2 outside:" in message


def test_only_the_given_bound_is_tested():
    def scaled(params, batch):
        factor = 1 if params["w"].dtype == jnp.float32 else 0.5
        return loss_fn(params, batch) * factor

    assert_gradients_close(scaled, PARAMS, BATCH, policy="mixed_bfloat16", cosine=0.999)
    assert_gradients_close(scaled, PARAMS, BATCH, policy="mixed_bfloat16", rtol=0.51)
    assert "relative" not in failure(
        lambda p, b: -scaled(p, b) if p["w"].dtype != jnp.float32 else scaled(p, b),
        PARAMS, BATCH, policy="mixed_bfloat16", cosine=0.9,
    ).splitlines()[0]  # fmt: skip
    failure(scaled, PARAMS, BATCH, policy="mixed_bfloat16", rtol=0.49)


def test_the_reference_is_in_float64():
    """An error of 2^-9 in float32 parameters' gradients is found, though the loss casts to float32."""

    def narrow(params, batch):
        w = through(params["w"])
        return loss_fn(params | {"w": w}, batch)

    low = PARAMS["w"].astype(ml_dtypes.bfloat16).astype(np.float64)
    grad = lambda w: X.T.astype(np.float64) @ (X.astype(np.float64) @ w - Y)
    exact = grad(np.float64(PARAMS["w"]))
    expected = np.linalg.norm(grad(low) - exact) / np.linalg.norm(exact)
    # The gradient of the cast is rounded to bfloat16 too, by at most 2^-8.
    assert_gradients_close(narrow, PARAMS, BATCH, policy="float32", rtol=expected + 2.0**-7)
    failure(narrow, PARAMS, BATCH, policy="float32", rtol=expected / 3)
    failure(narrow, PARAMS, BATCH, policy="float32")


def test_custom_rules_are_part_of_the_reference():
    @jax.custom_vjp
    def reversed_gradient(x):
        return x

    reversed_gradient.defvjp(lambda x: (x, None), lambda _, g: (-g,))
    loss = lambda p, b: loss_fn(p | {"w": reversed_gradient(p["w"])}, b)
    assert_gradients_close(loss, PARAMS, BATCH, policy="mixed_bfloat16")


def test_a_bias_before_a_normalisation_passes():
    def loss(params, batch):
        h = batch["x"] @ params["w"] + params["b"]
        h = (h - h.mean(0)).astype(jnp.float32)
        return jnp.mean(jnp.tanh(h - batch["y"].astype(jnp.float32)) ** 2)

    assert_gradients_close(loss, PARAMS, BATCH, policy="mixed_bfloat16")
    result = jax.jit(jt.value_and_grad(loss, "mixed_bfloat16"))(PARAMS, BATCH)
    assert np.abs(result.grads["b"]).max() > 0  # rounding errors of a gradient that is zero


@pytest.mark.parametrize("bounds", [{}, {"cosine": 0.99}, {"rtol": 0.02}])
@pytest.mark.parametrize("factor", [0.004, 0.001])
def test_a_small_gradient_of_the_wrong_sign_fails(factor, bounds):
    @jax.custom_vjp
    def reversed_in_bfloat16(x):
        return x

    backward = lambda _, g: (-g if g.dtype == jnp.bfloat16 else g,)
    reversed_in_bfloat16.defvjp(lambda x: (x, None), backward)

    def loss(params, x):
        small = x @ reversed_in_bfloat16(params["small"])
        return jnp.mean((x @ params["w"] + factor * small).astype(jnp.float32))

    params = {"w": np.full(8, 1.3, np.float32), "small": np.full(8, 0.7, np.float32)}
    x = np.linspace(0.1, 2, 64, dtype=np.float32).reshape(8, 8)
    found = rows(failure(loss, params, x, policy="mixed_bfloat16", **bounds))
    assert found["small"][:2] == pytest.approx((-1, 2), rel=0.05)


def test_rounding_errors_of_larger_gradients_are_no_fault():
    def loss(params, one):  # the small gradient cancels: it has an error of up to 2^-24 / 3e-5
        small = params["small"] * ((one + 3e-5) - one)
        return params["w"].sum() + small.sum()

    params = {"w": np.ones(8, np.float32), "small": np.ones(8, np.float32)}
    one = np.ones((), np.float32)
    assert_gradients_close(loss, params, one, policy="float32")
    alone = {"small": params["small"], "w": params["w"][:0]}
    found = failure(loss, alone, one, policy="float32")
    assert rows(found)["small"][1] > 32 * 2.0**-24


def test_a_loss_without_parameters_fails():
    message = failure(lambda p, x: x.sum(), {"empty": X[:0]}, X, policy="float32")
    assert "found no parameter with an element" in message


@pytest.mark.parametrize(
    "bounds, message",
    [
        ({"rtol": np.nan}, "rtol is nan; expected a finite number"),
        ({"rtol": np.inf}, "rtol is inf; expected a finite number"),
        ({"cosine": 2.0}, "cosine is 2.0; expected a number from -1 to 1"),
        ({"cosine": np.nan}, "cosine is nan; expected a number from -1 to 1"),
    ],
)
def test_wrong_bounds_are_named(bounds, message):
    with pytest.raises(ValueError, match=message):
        assert_gradients_close(loss_fn, PARAMS, BATCH, policy="float32", **bounds)


def test_the_loss_scale_falls_until_gradients_are_finite():
    large = lambda p, b: 100 * loss_fn(p, b)
    first = jax.jit(jt.value_and_grad(large, "mixed_float16"))(
        PARAMS, BATCH, loss_scale=jt.default_loss_scale("mixed_float16")
    )
    assert not first.finite
    assert_gradients_close(large, PARAMS, BATCH, policy="mixed_float16")
    message = failure(large, PARAMS, BATCH, policy="mixed_float16", rtol=1e-6)
    scale = float(message.split("(loss scale ")[1].split(")")[0])
    assert 1 <= scale < 65536


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_gradients_that_never_become_finite_fail():
    infinite = lambda p, b: loss_fn(p, b) * (1 + 0 * jnp.sum(p["w"] * 1e30).astype(jnp.float32))
    found = rows(failure(infinite, PARAMS, BATCH, policy="mixed_float16"))
    assert np.isnan(found["w"][0])
    assert np.isinf(found["w"][1])


def test_aux_weighted_losses_and_further_arguments_are_taken():
    def loss(params, batch, scale):
        return jt.WeightedLoss(loss_fn(params, batch) * scale * 7, 7.0), {"n": 1}

    assert_gradients_close(loss, PARAMS, BATCH, 2.0, policy="mixed_bfloat16", has_aux=True)


def test_a_long_table_is_cut():
    params = {f"w{i:02}": np.float32(i + 1) for i in range(14)}
    wrong = lambda p, b: sum(x * x * (1 if x.dtype == jnp.float32 else 2) for x in p.values())
    message = failure(wrong, params, None, policy="mixed_bfloat16")
    assert len(message.splitlines()) == 13
    assert message.endswith("... and 4 more")


def test_arguments_that_are_no_arrays_reach_the_loss():
    def loss(params, batch, train, name):
        assert name == "a"
        return loss_fn(params, batch) if train else 1 / 0

    assert_gradients_close(loss, PARAMS, BATCH, True, "a", policy="mixed_bfloat16")


def test_what_cannot_be_run_is_named():
    with pytest.raises(TypeError, match=r"^assert_gradients_close expects a function, got 3"):
        assert_gradients_close(3, PARAMS, BATCH, policy="mixed_bfloat16")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (PARAMS, BATCH))
    for params, batch in ((PARAMS, shapes[1]), (shapes[0], BATCH)):
        with pytest.raises(TypeError, match="^assert_gradients_close computes with the values"):
            assert_gradients_close(loss_fn, params, batch, policy="mixed_bfloat16")
