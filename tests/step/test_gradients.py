"""Gradients under a policy equal float64 closed forms to the precision of the compute dtype."""

import math
import re
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from absl.testing import parameterized

import jmp_train as jt
from jmp_train import testing

with_and_without_jit: Any = partial(chex.variants, with_jit=True, without_jit=True)
POLICIES = ("float32", "mixed_bfloat16", "mixed_float16", "bf16", "f16", "p=f16,c=bf16,o=f32")
N, D, K = 48, 12, 5


def eps(policy):
    return float(ml_dtypes.finfo(jt.get_policy(policy).compute_dtype).eps)


def data(seed=0):
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(N, D)), rng.normal(size=(D, K)) / math.sqrt(D)
    return x, w, rng.normal(size=(N, K)), rng.integers(0, K, N)


def as_float32(*arrays):
    return tuple(np.asarray(a, np.float32) for a in arrays)


# mean((xw - y)^2): the gradient in w is 2/(NK) x^T (xw - y).


def regression_loss(params, batch):
    residual = batch["x"] @ params["w"] - batch["y"]
    return jnp.mean(residual.astype(jnp.float32) ** 2)


def regression_gradient(x, w, y):
    return 2 / y.size * x.T @ (x @ w - y)


def regression_bound(x, w, y, eps):
    """Forward error of that formula with inputs, products and residuals rounded to `eps`."""
    return 8 * eps * 2 / y.size * np.abs(x).T @ (np.abs(x) @ np.abs(w) + np.abs(y))


# Mean cross entropy of softmax(xw): the gradient in w is 1/N x^T (softmax(xw) - onehot).


def softmax_loss(params, batch):
    logits = (batch["x"] @ params["w"]).astype(jnp.float32)
    label = jnp.take_along_axis(logits, batch["labels"][:, None], axis=1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - label)


def softmax_gradient(x, w, labels):
    p = np.exp(x @ w - (x @ w).max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return x.T @ (p - np.eye(K)[labels]) / N


def softmax_bound(x, w, eps):
    logit_error = 4 * eps * (np.abs(x) @ np.abs(w)).max(axis=1, keepdims=True)
    return np.abs(x).T @ (2 * logit_error + 4 * eps) / N


class ClosedFormTest(chex.TestCase):
    @with_and_without_jit
    @parameterized.product(policy=POLICIES, scale=(None, 1000.0))
    def test_linear_regression(self, policy, scale):
        x, w, y = as_float32(*data()[:3])
        loss_scale = None if scale is None else jt.DynamicLossScale(scale)
        grad_fn = self.variant(jt.value_and_grad(regression_loss, policy))
        result = grad_fn({"w": w}, {"x": x, "y": y}, loss_scale=loss_scale)
        x, w, y = (a.astype(np.float64) for a in (x, w, y))
        error = np.abs(np.asarray(result.grads["w"], np.float64) - regression_gradient(x, w, y))
        assert (error <= regression_bound(x, w, y, eps(policy))).all()
        assert result.grads["w"].dtype == result.loss.dtype == jnp.float32
        np.testing.assert_allclose(result.loss, np.mean((x @ w - y) ** 2), rtol=4 * eps(policy))
        assert result.finite

    @with_and_without_jit
    @testing.policies(*POLICIES)
    def test_softmax_regression(self, policy):
        x, w = as_float32(*data()[:2])
        labels = data()[3]
        loss_scale = jt.StaticLossScale(2.0**10)
        grad_fn = self.variant(jt.value_and_grad(softmax_loss, policy))
        result = grad_fn({"w": w}, {"x": x, "labels": labels}, loss_scale=loss_scale)
        x, w = x.astype(np.float64), w.astype(np.float64)
        error = np.abs(np.asarray(result.grads["w"], np.float64) - softmax_gradient(x, w, labels))
        assert (error <= softmax_bound(x, w, eps(policy))).all()
        assert result.finite


def test_each_policy_computes_in_its_own_dtype_and_no_better():
    x, w, y = as_float32(*data()[:3])
    want = regression_gradient(*(a.astype(np.float64) for a in (x, w, y)))
    error = {}
    for policy in ("float32", "mixed_float16", "mixed_bfloat16"):
        grads = jt.value_and_grad(regression_loss, policy)({"w": w}, {"x": x, "y": y}).grads
        error[policy] = np.abs(grads["w"] - want).max()
    assert 100 * error["float32"] < error["mixed_float16"] < error["mixed_bfloat16"] / 2


@testing.policies("float32", "f16", "bf16", "float8_e4m3fn", "mixed_bfloat16")
@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32"])
def test_gradients_are_float32_for_every_policy_and_parameter_dtype(policy, stored):
    seen = {}

    def loss_fn(params, batch):
        seen.update(param=params["w"].dtype, batch=batch["x"].dtype)
        return jnp.sum((params["w"] * batch["x"]).astype(jnp.float32))

    params, batch = {"w": jnp.ones(3, stored)}, {"x": jnp.ones(3)}
    result = jt.value_and_grad(loss_fn, policy)(params, batch)
    compute = jt.get_policy(policy).compute_dtype
    assert seen == {"param": compute, "batch": compute}
    assert result.grads["w"].dtype == jnp.float32
    assert result.loss_scale == jt.NoOpLossScale()
    np.testing.assert_array_equal(result.grads["w"], 1)


# float16's range.


def half_loss(params, batch):
    return (params["w"] * batch["x"]).astype(jnp.float16)


class RangeTest(chex.TestCase):
    @with_and_without_jit
    def test_a_float16_loss_of_three_does_not_overflow_at_a_scale_of_65536(self):
        grad_fn = self.variant(jt.value_and_grad(half_loss, "f16"))
        params, batch = {"w": jnp.float32(3)}, {"x": jnp.float32(1)}
        result = grad_fn(params, batch, loss_scale=jt.DynamicLossScale(2.0**16))
        assert result.loss == 3 and result.loss.dtype == jnp.float32
        assert result.finite and result.grads["w"] == 1

    @with_and_without_jit
    def test_flax_overflows_on_that_loss(self):
        flax = pytest.importorskip("flax.training.dynamic_scale")
        grad_fn = flax.DynamicScale().value_and_grad(lambda w: w * jnp.float16(1))
        with np.errstate(over="ignore"):
            result = self.variant(grad_fn)(jnp.float16(3))
        assert not result.finite and jnp.isnan(result.aux)

    @with_and_without_jit
    @parameterized.parameters(jt.StaticLossScale, jt.DynamicLossScale)
    def test_a_float16_loss_holds_the_scale_at_the_largest_power_of_two_it_can_pass_on(self, kind):
        grad_fn = self.variant(jt.value_and_grad(half_loss, "f16"))
        params, batch = {"w": jnp.float32(3)}, {"x": jnp.float32(1)}
        result = grad_fn(params, batch, loss_scale=kind(2.0**20))
        assert result.scaled_by == 2.0**15 and result.grads["w"] == 1
        # A dynamic scale comes down; a static one is static.
        expected = 2.0**20 if kind is jt.StaticLossScale else 2.0**15
        assert result.loss_scale.loss_scale == expected

    @with_and_without_jit
    def test_gradients_below_the_smallest_float16_vanish_unless_the_loss_is_scaled(self):
        rng = np.random.default_rng(0)
        x = (rng.uniform(1, 2, 64) * 2.0**-12).astype(np.float16).astype(np.float32)

        def loss_fn(params, batch):  # each gradient is x / 2^15: 2^-27 to 2^-26
            return jnp.sum((params["w"] * batch["x"]).astype(jnp.float32)) * 2.0**-15

        want = x.astype(np.float64) * 2.0**-15
        assert want.max() < 2.0**-25  # half of the smallest subnormal: rounds to zero
        grad_fn = self.variant(jt.value_and_grad(loss_fn, "mixed_float16"))
        params, batch = {"w": jnp.ones(64)}, {"x": x}
        np.testing.assert_array_equal(grad_fn(params, batch).grads["w"], 0)
        for loss_scale in (jt.StaticLossScale(2.0**16), jt.DynamicLossScale(2.0**16)):
            scaled = grad_fn(params, batch, loss_scale=loss_scale)
            np.testing.assert_array_equal(scaled.grads["w"], want)  # exact: x is a float16
            assert scaled.finite

    @with_and_without_jit
    def test_an_overflow_is_not_finite_halves_the_scale_and_leaves_the_loss_true(self):
        def loss_fn(params, batch):
            return jnp.sum((params["w"] * batch["x"]).astype(jnp.float32) ** 2)

        grad_fn = self.variant(jt.value_and_grad(loss_fn, "mixed_float16"))
        params, batch = {"w": jnp.array([1.0, 2.0])}, {"x": jnp.array([2.0, 1.0])}
        state = jt.DynamicLossScale(2.0**16, jnp.int32(7))
        result = grad_fn(params, batch, loss_scale=state)
        assert not result.finite and result.loss == 8
        assert (result.loss_scale.loss_scale, result.loss_scale.counter) == (2.0**15, 0)
        while not result.finite:
            result = grad_fn(params, batch, loss_scale=result.loss_scale)
        assert result.loss_scale.loss_scale == 2.0**12  # 8 x 2^12 is the first below 65,520
        np.testing.assert_array_equal(result.grads["w"], [8, 4])
        assert result.loss_scale.counter == 1 and result.loss == 8

    @with_and_without_jit
    @parameterized.parameters(jnp.nan, jnp.inf)
    def test_a_bad_batch_is_not_finite_even_without_a_scale(self, value):
        grad_fn = self.variant(jt.value_and_grad(regression_loss, "float32"))
        x = jnp.ones((N, D)).at[3, 4].set(value)
        result = grad_fn({"w": jnp.ones((D, K))}, {"x": x, "y": jnp.ones((N, K))})
        assert not result.finite

    @with_and_without_jit
    @parameterized.parameters("float16", "bfloat16", "float32")
    def test_a_scale_that_the_losss_dtype_rounds_is_divided_out_as_it_was_rounded(self, dtype):
        def loss_fn(params, batch):
            return (params["w"] * batch).astype(dtype)

        grad_fn = self.variant(jt.value_and_grad(loss_fn, "float32"))
        state = jt.DynamicLossScale(1001.1)
        result = grad_fn({"w": jnp.float32(1)}, jnp.float32(1), loss_scale=state)
        assert result.grads["w"] == 1
        assert result.loss_scale.loss_scale == np.float32(1001.1)


# Arguments and results.


class InterfaceTest(chex.TestCase):
    @with_and_without_jit
    def test_auxiliary_output_passes_through_unchanged(self):
        def loss_fn(params, batch):
            prediction = params["w"] * batch["x"]
            aux = {"prediction": prediction, "count": jnp.int32(3), "none": None}
            return jnp.sum(prediction.astype(jnp.float32)), aux

        grad_fn = self.variant(jt.value_and_grad(loss_fn, "mixed_bfloat16", has_aux=True))
        state = jt.DynamicLossScale(8.0)
        result = grad_fn({"w": jnp.ones(2)}, {"x": jnp.array([2.0, 3.0])}, loss_scale=state)
        assert result.loss == 5 and result.aux["count"] == 3 and result.aux["none"] is None
        assert result.aux["prediction"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(result.aux["prediction"], [2, 3])
        np.testing.assert_array_equal(result.grads["w"], [2, 3])

    @with_and_without_jit
    @parameterized.parameters(True, False)
    def test_the_batch_is_cast_only_when_asked(self, cast_batch):
        target = np.float32(1 + 2.0**-10)  # 1 in bfloat16

        def loss_fn(params, batch):
            return (params["w"] - batch["y"]).astype(jnp.float32), batch["i"]

        grad_fn = jt.value_and_grad(loss_fn, "bf16", has_aux=True, cast_batch=cast_batch)
        batch = {"y": target, "i": jnp.arange(2)}
        result = self.variant(grad_fn)({"w": jnp.float32(1)}, batch)
        assert result.loss == (0 if cast_batch else -(2.0**-10))
        assert result.aux.dtype == jnp.int32

    @with_and_without_jit
    def test_further_arguments_reach_the_loss_uncast(self):
        def loss_fn(params, batch, weight, *, key, shift):
            noise = jax.random.normal(key, batch.shape)
            assert weight.dtype == shift.dtype == jnp.float32
            return jnp.sum(params * batch * weight + shift + 0 * noise).astype(jnp.float32)

        grad_fn = self.variant(jt.value_and_grad(loss_fn, "mixed_bfloat16"))
        key, shift = jax.random.key(0), jnp.float32(1)
        result = grad_fn(jnp.ones(2), jnp.ones(2), jnp.float32(3), key=key, shift=shift)
        assert result.loss == 8
        np.testing.assert_array_equal(result.grads, 3)

    @with_and_without_jit
    def test_complex_and_python_parameters_are_unscaled_as_jax_grad_gives_them(self):
        def loss_fn(params, batch):
            return jnp.abs(params["c"] * batch) ** 2 + params["w"] * batch

        params, batch = {"c": jnp.complex64(1 + 2j), "w": 1.5}, jnp.float32(3)
        want = jax.grad(loss_fn)(params, batch)
        grad_fn = self.variant(jt.value_and_grad(loss_fn))
        result = grad_fn(params, batch, loss_scale=jt.DynamicLossScale(2.0**8))
        np.testing.assert_allclose(result.grads["c"], want["c"], rtol=1e-6)
        assert result.grads["c"].dtype == jnp.complex64
        assert result.grads["w"] == want["w"] == 3


def test_nothing_recompiles_when_the_scale_changes():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, batch, state):
        return jt.value_and_grad(regression_loss, "mixed_float16")(params, batch, loss_scale=state)

    chex.clear_trace_counter()
    params = {"w": jnp.full((D, K), 100.0)}
    batch = {"x": jnp.full((N, D), 10.0), "y": jnp.ones((N, K))}
    state, scales = jt.DynamicLossScale(2.0**24, period=2), set()
    for _ in range(20):
        state = step(params, batch, state).loss_scale
        scales.add(float(state.loss_scale))
    assert len(scales) > 5


def instructions(function, *args):
    """The optimized HLO less what names its source, and its cost."""
    compiled = jax.jit(function).lower(*args).compile()
    text = re.sub(r", (metadata=\{[^}]*\}|stack_frame_id=\d+)", "", compiled.as_text() or "")
    entry = text[text.index("\n\n") :]  # the first line is the module's name
    cost: Any = compiled.cost_analysis()
    return re.sub(r"\nFileNames.*?(?=\n\n%|\n\nENTRY)", "", entry, flags=re.DOTALL), cost


@pytest.mark.parametrize("loss_fn", [regression_loss, softmax_loss])
def test_a_float32_policy_costs_nothing(loss_fn):
    x, w, y = as_float32(*data()[:3])
    params, batch = {"w": w}, {"x": x, "y": y, "labels": data()[3].astype(np.int32)}

    def ours(params, batch):
        result = jt.value_and_grad(loss_fn, "float32")(params, batch)
        return result.loss, result.grads

    our_text, our_cost = instructions(ours, params, batch)
    text, cost = instructions(jax.value_and_grad(loss_fn), params, batch)
    assert our_cost["flops"] == cost["flops"] > N * D * K
    assert our_cost["bytes accessed"] == cost["bytes accessed"] > 0
    opcodes = re.compile(r"= \S+ ([a-z-]+)\(")
    assert sorted(opcodes.findall(our_text)) == sorted(opcodes.findall(text))
    assert len(opcodes.findall(text)) > 5


def test_float64_parameters_keep_float64_gradients():
    with jax.enable_x64(True):
        x, w, y, _ = data()
        grad_fn = jt.value_and_grad(regression_loss64, "float64")
        state = jt.DynamicLossScale(2.0**16)
        result = jax.jit(grad_fn)({"w": w}, {"x": x, "y": y}, loss_scale=state)
        assert result.loss.dtype == result.grads["w"].dtype == jnp.float64
        assert result.loss_scale.loss_scale.dtype == jnp.float32
        np.testing.assert_allclose(result.grads["w"], regression_gradient(x, w, y), rtol=1e-12)
        half = jt.value_and_grad(regression_loss, "c=bf16")({"w": w}, {"x": x, "y": y})
        assert half.grads["w"].dtype == jnp.float64 and half.loss.dtype == jnp.float32


def regression_loss64(params, batch):
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


# Errors.


@pytest.mark.parametrize(
    "loss_fn,message",
    [
        (lambda p, b: p["w"], r"the loss has shape \(2,\) and dtype float32; expected a real scalar"),
        (lambda p, b: p["w"][:1], r"the loss has shape \(1,\)"),
        (lambda p, b: p["w"].sum() * 1j, r"the loss has shape \(\) and dtype complex64"),
        (lambda p, b: jnp.int32(3), r"the loss has shape \(\) and dtype int32"),
        (lambda p, b: (p["w"].sum(), 1.0), "pass has_aux=True"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("jit", [jax.jit, lambda f: f])
def test_a_loss_that_is_no_real_scalar_is_a_type_error(loss_fn, message, jit):
    with pytest.raises(TypeError, match=message):
        jit(jt.value_and_grad(loss_fn))({"w": jnp.ones(2)}, None)


@pytest.mark.parametrize(
    "leaf,dtype",
    [
        (jnp.int32(3), "int32"),
        (3, "int32"),
        (jnp.array(True), "bool"),
        (jax.random.key(0), "key<fry>"),
        (jax.random.PRNGKey(0), "uint32"),
    ],
)
def test_a_parameter_that_cannot_be_trained_is_named_by_its_path(leaf, dtype):
    params = {"layers": [{"w": jnp.ones(2)}, {"count": leaf}]}
    message = f"parameter 'layers/1/count' has dtype {dtype}; expected a floating dtype"
    with pytest.raises(TypeError, match=re.escape(message)):
        jt.value_and_grad(lambda p, b: p["layers"][0]["w"].sum())(params, None)


def test_an_unknown_policy_is_refused_when_the_function_is_made():
    with pytest.raises(ValueError, match="did you mean 'mixed_float16'"):
        jt.value_and_grad(regression_loss, "mixd_float16")
