"""Evaluation: masked means against float64, one compilation, padding that cannot leak."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import jmp_train as jt
from jmp_train.data import eval_batches


@pytest.mark.parametrize("size,batch_size", [(10, 4), (8, 4), (3, 4), (1, 1), (257, 64)])
def test_the_mean_counts_every_example_once_for_every_batch_size(size, batch_size):
    x = np.random.default_rng(size).normal(size=size).astype(np.float32)
    evaluate = jt.make_evaluate(lambda params, batch: {"value": batch["x"] * params})
    result = evaluate(jnp.float32(2.0), eval_batches({"x": x}, batch_size))
    # Sums of up to 64 float32 values of order 1, then float64: 64 * 2^-24.
    assert result["value"] == pytest.approx(2 * x.astype(np.float64).mean(), abs=64 * 2**-24)


def test_padding_cannot_leak_even_when_its_value_is_nan():
    batch = {"x": jnp.array([1.0, jnp.nan]), "mask": jnp.array([True, False])}
    evaluate = jt.make_evaluate(lambda params, batch: {"x": batch["x"]})
    assert evaluate(0.0, [batch]) == {"x": 1.0}


def test_one_compilation_serves_all_batches_and_calls():
    @chex.assert_max_traces(n=1)
    def metrics_fn(params, batch):
        return {"x": batch["x"] * params}

    evaluate = jt.make_evaluate(metrics_fn)
    for params in (1.0, 2.0):
        evaluate(jnp.float32(params), eval_batches({"x": np.arange(10.0, dtype=np.float32)}, 3))


def test_metrics_get_the_compute_dtype_and_an_uncast_model_state():
    seen = {}

    def metrics_fn(params, batch, *, model_state):
        seen.update(p=params.dtype, x=batch["x"].dtype, s=model_state.dtype, y=batch["y"].dtype)
        return {"x": batch["x"]}

    evaluate = jt.make_evaluate(metrics_fn, "mixed_bfloat16")
    batch = {"x": jnp.ones(2), "y": jnp.ones(2, jnp.int32)}
    assert evaluate(jnp.ones(()), [batch], model_state=jnp.ones(())) == {"x": 1.0}
    assert seen == {"p": jnp.bfloat16, "x": jnp.bfloat16, "s": jnp.float32, "y": jnp.int32}


def test_an_empty_data_set_is_refused():
    evaluate = jt.make_evaluate(lambda params, batch: {"x": batch["x"]})
    with pytest.raises(ValueError, match="has no examples"):
        evaluate(0.0, [])


@pytest.mark.parametrize("as_batch", [lambda x: x, lambda x: (x, x), lambda x: {"x": x}])
def test_a_batch_is_any_pytree(as_batch):
    first = lambda batch: (
        batch if hasattr(batch, "shape") else next(iter(dict(enumerate(batch)).values()))
    )
    metrics_fn = lambda params, batch: {
        "x": batch["x"] if isinstance(batch, dict) else first(batch)
    }
    assert jt.make_evaluate(metrics_fn)(0.0, [as_batch(jnp.array([1.0, 3.0]))]) == {"x": 2.0}


def test_values_in_half_precision_are_summed_in_float32():
    # 4,096 ones: in float16 the sum stalls at 2,048.
    evaluate = jt.make_evaluate(lambda params, batch: {"x": batch.astype(jnp.bfloat16)})
    assert evaluate(0.0, [jnp.ones(4097)]) == {"x": 1.0}


def test_several_values_an_example_are_averaged_where_their_mask_counts_them():
    batch = {
        "x": jnp.array([[1.0, 2.0], [4.0, 8.0]]),
        "mask": jnp.array([[True, False], [True, True]]),
    }
    evaluate = jt.make_evaluate(lambda params, batch: {"x": batch["x"]})
    assert evaluate(0.0, [batch]) == {"x": pytest.approx(13 / 3)}


@pytest.mark.parametrize("shape", [(3,), (2, 3), ()])
def test_a_mask_of_another_shape_than_the_values_is_refused(shape):
    evaluate = jt.make_evaluate(lambda params, batch: {"x": batch["x"]})
    batch = {"x": jnp.ones((2, 2)), "mask": jnp.ones(shape, bool)}
    with pytest.raises(ValueError, match=r"'x' has shape \(2, 2\); expected that of the mask"):
        evaluate(0.0, [batch])


def test_a_mask_per_example_counts_all_its_values_and_a_mask_per_token_its_example():
    evaluate = jt.make_evaluate(lambda params, batch: {"x": batch["x"]})
    tokens = {"x": jnp.array([[1.0, 2.0], [4.0, 8.0]]), "mask": jnp.array([False, True])}
    assert evaluate(0.0, [tokens]) == {"x": 6.0}
    examples = {"x": jnp.array([3.0, 5.0]), "mask": jnp.array([[False, False], [True, False]])}
    assert evaluate(0.0, [examples]) == {"x": 5.0}
