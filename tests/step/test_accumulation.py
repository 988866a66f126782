"""Micro-batches: the large batch's gradients, accumulated in float32 and checked once."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

import jmp_train as jt
from jmp_train import testing
from jmp_train._jaxpr.compat import scan_counts

B, D = 16, 6


def data(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(B, D)).astype(dtype), rng.normal(size=B).astype(dtype)
    mask = np.zeros((B, 1), bool)
    # Part n of 4 has rows n, n + 4, n + 8, n + 12: 4 of these, 1, none, 1 are in the mask.
    mask[[0, 4, 8, 12, 1, 7]] = True
    return {"w": rng.normal(size=D).astype(dtype)}, {"x": x, "y": y, "mask": mask}


def residual(params, batch):
    return (batch["x"] @ params["w"] - batch["y"]).astype(jnp.float32)


def mean_loss(params, batch):
    return jnp.mean(residual(params, batch) ** 2)


def weighted_loss(params, batch):
    mask = batch["mask"][:, 0]
    return jt.WeightedLoss(jnp.sum(jnp.where(mask, residual(params, batch) ** 2, 0)), mask.sum())


def oracle(params, batch, mask=None):
    """The loss and its gradient over the rows in the mask, in float64, and float32's error bound."""
    rows = np.ones(B, bool) if mask is None else mask[:, 0]
    x, y = (batch[k][rows].astype(np.float64) for k in "xy")
    w = params["w"].astype(np.float64)
    r = x @ w - y
    # Each product, residual and sum of at most B terms is rounded: B + D + 4 roundings bound it.
    size = (2 / len(y)) * np.abs(x).T @ (np.abs(x) @ np.abs(w) + np.abs(y))
    return np.mean(r**2), 2 / len(y) * x.T @ r, (B + D + 4) * 2.0**-24 * size


@pytest.mark.parametrize("micro_batches", [2, 16])
def test_micro_batches_give_the_large_batchs_loss_and_gradients(micro_batches):
    params, batch = data()
    loss, grads, bound = oracle(params, batch)
    result = jax.jit(jt.value_and_grad(mean_loss, micro_batches=micro_batches))(params, batch)
    np.testing.assert_allclose(result.loss, loss, rtol=(B + D) * 2.0**-24)
    assert (np.abs(result.grads["w"] - grads) <= bound).all()
    assert result.loss.dtype == result.grads["w"].dtype == jnp.float32


def test_float64_parameters_accumulate_in_float64():
    with jax.enable_x64(True):
        params, batch = data(dtype=np.float64)
        _, grads, bound = oracle(params, batch)

        def loss_fn(params, batch):
            return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)

        grad_fn = jt.value_and_grad(loss_fn, "float64", micro_batches=4)
        result = jax.jit(grad_fn)(params, batch)
        assert result.grads["w"].dtype == result.loss.dtype == jnp.float64
        assert (np.abs(result.grads["w"] - grads) <= bound * 2.0**-29).all()
        # A float32 loss with a weight, and float64 gradients of it.
        grad_fn = jt.value_and_grad(weighted_loss, "p=f64,c=f32", micro_batches=4)
        result = jax.eval_shape(grad_fn, params, batch)
        assert result.grads["w"].dtype == jnp.float64 and result.loss.dtype == jnp.float32


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_a_token_weighs_the_same_in_every_micro_batch(micro_batches):
    params, batch = data()
    loss, grads, bound = oracle(params, batch, batch["mask"])
    result = jax.jit(jt.value_and_grad(weighted_loss, micro_batches=micro_batches))(params, batch)
    np.testing.assert_allclose(result.loss, loss, rtol=(B + D) * 2.0**-24)
    assert (np.abs(result.grads["w"] - grads) <= bound).all()
    assert result.finite  # though one part has no token


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_a_batch_without_any_weight_has_zero_loss_and_gradients(micro_batches):
    params, batch = data()
    batch["mask"][:] = False
    grad_fn = jt.value_and_grad(weighted_loss, "mixed_float16", micro_batches=micro_batches)
    result = jax.jit(grad_fn)(params, batch, loss_scale=jt.StaticLossScale(8.0))
    assert result.loss == 0 and result.finite
    np.testing.assert_array_equal(result.grads["w"], 0)


def test_a_nan_in_a_part_without_weight_is_not_hidden():
    params, batch = data()
    assert not batch["mask"][2::4].any()
    batch["x"][10] = np.nan
    result = jax.jit(jt.value_and_grad(weighted_loss, micro_batches=4))(params, batch)
    assert not result.finite


def test_a_weight_of_100000_does_not_bring_float16_nearer_to_its_limit():
    def loss_fn(params, batch):
        return jt.WeightedLoss(1e5 * jnp.mean((params["w"] * batch).astype(jnp.float32)), 100_000)

    params, batch = {"w": jnp.ones(4)}, jnp.ones((4, 4))
    for micro_batches in (1, 4):
        grad_fn = jt.value_and_grad(loss_fn, "mixed_float16", micro_batches=micro_batches)
        result = jax.jit(grad_fn)(params, batch, loss_scale=jt.StaticLossScale(2.0**15))
        assert result.finite and result.loss == 1
        np.testing.assert_array_equal(result.grads["w"], 0.25)


def test_bfloat16_gradients_are_summed_in_float32():
    # In bfloat16 a sum of ones stands still at 256.
    grad_fn = jt.value_and_grad(lambda p, b: jnp.sum(p * b), "bf16", micro_batches=1024)
    result = jax.jit(grad_fn)(jnp.bfloat16(1), jnp.ones(1024))
    assert result.grads == 1 and result.loss == 1


def equations_outside_loops(jaxpr):
    """Return the equations of a jaxpr and of its calls, without those of its scans and branches."""
    found = []
    for eqn in jaxpr.eqns:
        found.append(eqn)
        if eqn.primitive.name not in ("scan", "cond"):
            for sub in jaxprs_in_params(eqn.params):
                found += equations_outside_loops(sub)
    return found


@testing.policies("mixed_bfloat16", "mixed_float16", "bf16", "f16")
def test_accumulators_are_float32_and_the_check_is_done_once(policy):
    stepper = jt.make_step(mean_loss, optax.sgd(0.1), policy, skip_nonfinite=True, micro_batches=4)
    params, batch = data()
    state = stepper.init(params)
    outside = equations_outside_loops(jax.make_jaxpr(stepper.step)(state, batch).jaxpr)
    (loop,) = (eqn for eqn in outside if eqn.primitive.name == "scan")
    start, count = scan_counts(loop.params)
    carry = [v.aval for v in loop.invars[start : start + count]]
    assert [(a.shape, a.dtype) for a in carry] == [((D,), jnp.float32)]
    body = str(loop.params["jaxpr"])
    compute = "bf16" if "bf" in policy else "f16"
    assert f"{compute}[4,6]" in body  # it really computes narrower
    checks = [eqn for eqn in outside if eqn.primitive.name == "is_finite"]
    checked = [v for eqn in checks for v in eqn.invars if v.aval.shape == (D,)]
    assert len(checked) == 1  # which gradients failed it is looked up where a step is skipped
    assert all(eqn.invars[0].aval.shape in ((D,), ()) for eqn in checks)  # (): the scale's own
    assert "is_finite" not in body


@pytest.mark.parametrize("bad", [0, 3])
def test_an_overflow_in_one_micro_batch_skips_the_whole_update(bad):
    stepper = jt.make_step(
        chex.assert_max_traces(n=1)(mean_loss),
        optax.adam(0.1),
        "mixed_float16",
        loss_scale=jt.DynamicLossScale(2.0**10),
        micro_batches=4,
    )
    chex.clear_trace_counter()
    params, batch = data()
    state, info = stepper.step(stepper.init(params), batch)
    assert info.finite
    before = jax.tree.map(np.array, (state.params, state.opt_state))
    overflowing = batch["x"].copy()
    overflowing[bad + 4, 2] = 6e4
    state, info = stepper.step(state, {**batch, "x": overflowing})
    assert not info.finite and int(state.skipped) == 1
    assert float(state.loss_scale.loss_scale) == 2.0**9
    chex.assert_trees_all_equal((state.params, state.opt_state), before)
    state, info = stepper.step(state, batch)
    assert info.finite and info.loss_scale == 2.0**9


def test_clipping_sees_the_accumulated_gradient():
    # The parts' gradients are 30 and -26, their mean 2: under a limit of 3 nothing is clipped,
    # while clipping each part to 3 would leave 0.
    opt = optax.chain(optax.clip_by_global_norm(3.0), optax.sgd(1.0))
    stepper = jt.make_step(
        lambda p, b: jnp.mean(p * b), opt, "mixed_float16", micro_batches=2, grad_norm=True
    )
    state = stepper.init(jnp.float32(10))
    state = state._replace(loss_scale=jt.DynamicLossScale(jnp.float32(8)))
    state, info = stepper.step(state, jnp.array([28.0, -26, 32, -26]))
    assert state.params == 8 and info.grad_norm == 2


def test_each_micro_batch_has_its_own_key_and_a_step_can_be_repeated():
    def noisy(params, batch, *, key):
        return jnp.mean(params * batch), {"key": jax.random.key_data(key)}

    stepper = jt.make_step(noisy, optax.sgd(0.1), micro_batches=4)
    keys = []
    for _ in range(2):
        state = stepper.init(jnp.float32(1), key=jax.random.key(3))
        for _ in range(2):
            state, info = stepper.step(state, jnp.ones(4))
            keys.append(np.asarray(info.aux["key"]))
    np.testing.assert_array_equal(keys[:2], keys[2:])
    assert len({tuple(k) for k in np.concatenate(keys[:2])}) == 8
    at = jax.random.fold_in(jax.random.key(3), 1)
    want = [jax.random.key_data(jax.random.fold_in(at, i)) for i in range(4)]
    np.testing.assert_array_equal(keys[1], want)


def test_auxiliary_scalars_are_averaged_by_weight_and_the_rest_is_stacked():
    def loss_fn(params, batch):
        mask = batch["mask"][:, 0]
        mean = jnp.sum(batch["y"] * mask) / mask.sum()  # 0 / 0 in the part without a row
        rest = {"rows": batch["y"], "count": mask.sum(), "none": None}
        return weighted_loss(params, batch), {"mean": mean, **rest}

    params, batch = data()
    aux = jax.jit(jt.value_and_grad(loss_fn, has_aux=True, micro_batches=4))(params, batch).aux
    want = batch["y"].astype(np.float64)[batch["mask"][:, 0]].mean()
    assert float(aux["mean"]) == pytest.approx(want, rel=2.0**-20) and aux["mean"].shape == ()
    np.testing.assert_array_equal(aux["rows"], [batch["y"][n::4] for n in range(4)])
    np.testing.assert_array_equal(aux["count"], [4, 1, 0, 1])
    assert aux["none"] is None


def test_model_state_goes_from_micro_batch_to_micro_batch():
    def loss_fn(params, batch, *, model_state):
        mean = (model_state["mean"] + batch.mean()) / 2
        new = {"mean": mean.astype(jnp.bfloat16), "seen": model_state["seen"] + 1}
        return jnp.mean(params * batch), {"mean": mean}, new

    stepper = jt.make_step(loss_fn, optax.sgd(0.1), micro_batches=2)
    state = stepper.init(jnp.float32(1), model_state={"mean": jnp.float32(0), "seen": 0})
    state, info = stepper.step(state, jnp.array([4.0, 8, 4, 8]))
    # ((0 + 4) / 2 + 8) / 2, in float32 though the model returned bfloat16
    assert state.model_state["mean"] == 5 and state.model_state["mean"].dtype == jnp.float32
    assert state.model_state["seen"] == 2
    assert info.aux["mean"] == (2 + 5) / 2 and set(info.aux) == {"mean"}


def test_the_memory_for_activations_is_that_of_one_micro_batch():
    def loss_fn(params, batch):
        for w in params:
            batch = jnp.tanh(batch @ w)
        return jnp.mean(batch**2)

    params, batch = [jnp.ones((16, 16))] * 4, jnp.ones((4096, 16))
    temporary = {}
    for n in (1, 16):
        compiled = jax.jit(jt.value_and_grad(loss_fn, micro_batches=n)).lower(params, batch)
        analysis: Any = compiled.compile().memory_analysis()
        temporary[n] = analysis.temp_size_in_bytes
    activations = 4 * 4096 * 16 * 4
    assert temporary[1] >= activations
    assert temporary[16] <= temporary[1] / 8  # a sixteenth, and the accumulators


def test_several_accumulated_steps_in_one_dispatch_are_bitwise_single_ones():
    params, batch = data()
    stepper = jt.make_step(mean_loss, optax.adam(0.1), "mixed_bfloat16", micro_batches=4)
    one, many = stepper.init(params), stepper.init(params)
    for _ in range(3):
        one, _ = stepper.step(one, batch)
    many, infos = stepper.scan(many, jax.tree.map(lambda x: np.stack([x] * 3), batch))
    assert infos.loss.shape == (3,)
    chex.assert_trees_all_equal(one, many)


# Errors.


@pytest.mark.parametrize("micro_batches", [0, -1, 2.0, None])
def test_a_number_of_micro_batches_that_is_none_is_refused(micro_batches):
    with pytest.raises(ValueError, match="micro_batches is .*; expected a whole number"):
        jt.make_step(mean_loss, optax.sgd(0.1), micro_batches=micro_batches)


@pytest.mark.parametrize(
    "batch,message",
    [
        (
            {"x": jnp.ones((6, 2))},
            "has 6 examples; expected a multiple of 4, to be split into 4 mic",
        ),
        ({"x": jnp.ones(4), "t": jnp.ones(())}, "batch leaf 't' is a scalar; expected a leading"),
        ({"x": jnp.ones(4), "t": 1.0}, "batch leaf 't' is a scalar; expected a leading"),
        ({"x": jnp.ones(4), "y": jnp.ones(8)}, r"differ in the size .*: \{'x': 4, 'y': 8\}"),
        (None, "the batch has no arrays"),
    ],
)
def test_a_batch_that_cannot_be_split_is_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        jt.value_and_grad(lambda p, b: p, micro_batches=4)(jnp.float32(1), batch)


def test_a_weight_that_is_no_scalar_is_refused():
    with pytest.raises(TypeError, match=r"the weight has shape \(3,\)"):
        jt.value_and_grad(lambda p, b: jt.WeightedLoss(p, b))(jnp.float32(1), jnp.ones(3))
    with pytest.raises(TypeError, match="the loss has shape"):
        jt.value_and_grad(lambda p, b: jt.WeightedLoss(p * b, 1.0))(jnp.float32(1), jnp.ones(3))


@pytest.mark.parametrize("dtype", ["int32", "complex64"])
def test_a_total_that_is_not_real_and_floating_is_refused(dtype):
    """Cast to float32 it would have no gradient, or lose its imaginary part."""
    loss_fn = lambda p, b: jt.WeightedLoss(p.astype(dtype) * 2, 1.0)
    with pytest.raises(TypeError, match=f"total of the weighted loss has dtype {dtype}"):
        jt.value_and_grad(loss_fn)(jnp.float32(1), jnp.ones(3))


@pytest.mark.parametrize(
    "dtype,axis_name,message",
    [
        ("bfloat16", None, "without an axis to reduce over; expected an axis_name"),
        ("bfloat17", "data", "did you mean 'bfloat16'"),
        ("float8_e4m3fn", "data", "expected one of float64, float32, bfloat16, float16"),
    ],
)
def test_a_reduce_dtype_that_is_none_is_refused(dtype, axis_name, message):
    with pytest.raises(ValueError, match=message):
        jt.value_and_grad(mean_loss, axis_name=axis_name, reduce_dtype=dtype)
