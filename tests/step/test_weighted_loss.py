"""`WeightedLoss`: every split of a batch gives the result of the whole batch, for all weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jmp_train as jt
from jmp_train import testing


def loss_fn(params, batch):
    return jt.WeightedLoss((batch["t"] * params).sum(), batch["w"].sum())


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_a_part_of_weight_zero_keeps_its_total(micro_batches):
    batch = {"t": jnp.array([1.0, 2, 3, 4]), "w": jnp.array([1.0, 1, 0, 0])}
    grad_fn = jax.jit(jt.value_and_grad(loss_fn, micro_batches=micro_batches))
    for rows in ([0, 1, 2, 3], [2, 0, 3, 1]):  # weight 0 in none, and in one of two parts
        result = grad_fn(jnp.float32(1), {name: x[np.array(rows)] for name, x in batch.items()})
        assert result.loss == result.grads == 5 and result.finite


GRAD_FNS = {n: jax.jit(jt.value_and_grad(loss_fn, micro_batches=n)) for n in (1, 2, 8)}
# Multiples of 1/4: the sums of eight are exact, so a sum of 0 is 0 in any order.
numbers = st.lists(st.integers(-64, 64).map(lambda n: n / 4), min_size=8, max_size=8)


@given(numbers, numbers, st.sampled_from([2.0**-20, 1.0, 2.0**20]))
@settings(max_examples=200, deadline=None)
def test_signed_weights_give_the_same_in_any_split(totals, weights, scale):
    batch = {"t": jnp.array(totals, jnp.float32), "w": scale * jnp.array(weights, jnp.float32)}
    weight = scale * sum(weights) or 1.0
    exact = np.float64(sum(totals)) / weight
    # Each total is divided by its weight, multiplied by it and summed: 4 roundings of each, and 8
    # in the sums.
    bound = 12 * 2.0**-24 * np.abs(totals).sum() / abs(weight)
    for micro_batches, grad_fn in GRAD_FNS.items():
        result = grad_fn(jnp.float32(1), batch)
        assert abs(result.loss - exact) <= bound, micro_batches
        assert abs(result.grads - exact) <= bound, micro_batches


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_weights_that_cancel_divide_by_one_in_any_split(micro_batches):
    batch = {"t": jnp.array([1.0, 2, 3, 4]), "w": jnp.array([1.0, 2, -2, -1])}

    def with_metric(params, batch):
        return loss_fn(params, batch), {"one": jnp.float32(1)}

    grad_fn = jt.value_and_grad(with_metric, has_aux=True, micro_batches=micro_batches)
    result = jax.jit(grad_fn)(jnp.float32(1), batch)
    assert result.loss == result.grads == 10 and result.aux["one"] == 1


@testing.policies("mixed_float16", "mixed_bfloat16")
def test_a_count_in_half_precision_is_refused(policy):
    def loss_fn(params, batch):
        return jt.WeightedLoss((batch["x"] * params).astype(jnp.float32).sum(), batch["m"].sum())

    batch = {"x": jnp.ones(1001), "m": jnp.ones(1001)}  # in bfloat16 they sum to 1,000
    with pytest.raises(TypeError, match=r"the weight has dtype .*; expected float32 or an integer"):
        jt.value_and_grad(loss_fn, policy)(jnp.float32(1), batch)
    result = jt.value_and_grad(loss_fn, policy)(jnp.float32(1), {**batch, "m": batch["m"] > 0})
    assert result.loss == 1


@pytest.mark.parametrize("weight", [jnp.inf, -jnp.inf, jnp.nan])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_weight_that_is_not_finite_is_not_hidden(weight, micro_batches):
    batch = {"t": jnp.ones(4), "w": jnp.array([1.0, 1, 1, weight])}
    result = jt.value_and_grad(loss_fn, micro_batches=micro_batches)(jnp.float32(1), batch)
    assert not jnp.isfinite(result.loss) and not result.finite


@pytest.mark.parametrize("weights", [[0.3, 1, 0.6, 1, -0.9, 1], [1e-3, 1, 1e-3, 1, 0, 0]])
def test_a_part_of_little_weight_does_not_overflow_float16(weights):
    # The first of two parts weighs 6e-8, or 0.002, its gradient is 3: divided by that it would overflow.
    def half(params, batch):
        return jt.WeightedLoss((batch["t"] * params).astype(jnp.float32).sum(), batch["w"].sum())

    batch = {"t": jnp.ones(6), "w": jnp.array(weights)}
    exact = 6 / np.float64(weights).sum()
    for micro_batches in (1, 2):
        grad_fn = jt.value_and_grad(
            half, "mixed_float16", micro_batches=micro_batches, cast_batch=False
        )
        result = grad_fn(jnp.float32(1), batch, loss_scale=jt.StaticLossScale(2.0**8))
        assert result.finite
        np.testing.assert_allclose(result.grads, exact, rtol=2.0**-10)  # one rounding to float16
