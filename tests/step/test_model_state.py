"""A model state that becomes non-finite skips its step; one that never was finite does not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmp_train as jt
from jmp_train.runs.loop import nonfinite_gradients


def with_variance(params, batch, *, model_state):
    """The variance of activations of 300 or more is beyond float16; the loss's gradients are not."""
    seen = batch["x"] * params["w"]
    var = 0.5 * model_state["var"].astype(seen.dtype) + 0.5 * jnp.mean(seen**2)
    new = {"count": model_state["count"] + 1, "best": model_state["best"], "var": var}
    return jnp.mean(jnp.tanh(seen.astype(jnp.float32))), None, new


STATE = {"count": 0, "best": jnp.inf, "var": 1.0}


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_variance_beyond_float16_skips_the_step_and_training_recovers(micro_batches):
    stepper = jt.make_step(
        with_variance, optax.sgd(0.1), "mixed_float16",
        loss_scale=jt.DynamicLossScale(2.0**4, period=2), micro_batches=micro_batches,
    )  # fmt: skip
    state = stepper.init({"w": jnp.ones(4)}, model_state=STATE)
    good, bad = {"x": np.ones((4, 4))}, {"x": np.full((4, 4), 300.0)}
    state, info = stepper.step(state, good)
    assert info.finite  # though `best` is infinite, as it was
    before = jax.tree.map(np.array, (state.params, state.model_state))
    state, info = stepper.step(state, bad)
    assert not info.finite and int(state.skipped) == int(state.skipped_in_row) == 1
    for old, new in zip(
        jax.tree.leaves(before), jax.tree.leaves((state.params, state.model_state)), strict=True
    ):
        np.testing.assert_array_equal(new, old)
    assert nonfinite_gradients(state) == ["model_state/var"]
    # The scale did not cause it: the gradients were finite, the second time in a row.
    assert state.loss_scale.loss_scale == 2.0**5
    state, info = stepper.step(state, good)
    assert info.finite and np.isfinite(state.model_state["var"])
    assert state.model_state["count"] == 2 * micro_batches
    assert stepper.step._cache_size() == 1


def test_gradients_and_model_state_are_named_together():
    def both(params, batch, *, model_state):
        return jnp.sum(params["a"] * batch), None, {"m": batch.sum()}

    stepper = jt.make_step(both, optax.sgd(0.1), skip_nonfinite=True)
    state = stepper.init({"a": jnp.ones(2), "b": jnp.ones(2)}, model_state={"m": 0.0})
    state, _ = stepper.step(state, jnp.array([1.0, jnp.nan]))
    assert nonfinite_gradients(state) == ["a", "model_state/m"]


def test_without_skipping_the_model_state_is_not_looked_at():
    stepper = jt.make_step(with_variance, optax.sgd(0.1), "mixed_bfloat16")
    state = stepper.init({"w": jnp.ones(4)}, model_state=STATE)
    text = stepper.step.lower(state, {"x": jnp.ones((4, 4))}).as_text()
    assert "is_finite" not in text
