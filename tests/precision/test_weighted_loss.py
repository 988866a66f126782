"""`WeightedLoss`: any split of a batch gives what the whole gives, whatever the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jmp_train as jt


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
