"""Masks of examples and of single values, in training and in evaluation, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmp_train as jt
from jmp_train.models import Model
from jmp_train.spec import DataSpec
from jmp_train.tasks import make_task

RNG = np.random.default_rng(0)
EXAMPLES = 13
X = RNG.normal(size=(EXAMPLES, 5)).astype(np.float32)
LABELS = RNG.integers(0, 2, (EXAMPLES, 6))
NUMBERS = RNG.normal(size=(EXAMPLES, 2, 3)).astype(np.float32)
TOLERANCE = {"rel": 1e-5, "abs": 1e-6}  # sums of at most 80 float32 numbers of order 1
MASKS = {  # one has an example without any value
    shape: (RNG.random((EXAMPLES, *shape)) < 0.6)
    & (np.arange(EXAMPLES) != 4).reshape(-1, *[1] * len(shape))
    for shape in [(), (6,), (2,), (2, 3)]
}


def network(shape):
    """A linear map to outputs of a shape."""

    def linear():
        return (
            lambda key: jax.random.normal(key, (5, 6)),
            lambda w, x: (x @ w).reshape(-1, *shape),
        )

    return linear


def functions(task, batch, shape):
    return make_task(Model(network(shape)), task, DataSpec.of(batch, classes=3), "float32")


def both(made, batch):
    """Losses and metrics of a training step of two micro-batches, and of an evaluation in parts."""
    params, _ = made.init(jax.random.key(0))
    even = {k: v[:12] for k, v in batch.items()}
    parts = [{k: v[a:b] for k, v in batch.items()} for a, b in ((0, 5), (5, 6), (6, 12))]
    stepper = jt.make_step(made.loss_fn, optax.sgd(0.0), made.precision, micro_batches=2)
    _, info = stepper.step(stepper.init(jnp.copy(params)), even)
    evaluate = jt.make_evaluate(made.metrics_fn, made.precision, cast_batch=False)
    outputs = X[:12].astype(np.float64) @ np.asarray(params, np.float64)
    return float(info.loss), evaluate(params, parts), outputs


@pytest.mark.parametrize("shape", [(), (6,)])
def test_multi_label_honours_a_mask_of_examples_and_of_labels(shape):
    batch = {"image": X, "labels": LABELS, "mask": MASKS[shape]}
    loss, metrics, logits = both(functions("multi_label", batch, (6,)), batch)
    mask = np.broadcast_to(MASKS[shape][:12].reshape(12, -1), (12, 6))
    found, right = logits > 0, LABELS[:12] > 0
    losses = np.logaddexp(0, logits) - LABELS[:12] * logits
    hits, misses = (found & right)[mask].sum(), (found != right)[mask].sum()
    assert loss == pytest.approx(losses[mask].mean(), **TOLERANCE)
    assert metrics["loss"] == pytest.approx(losses[mask].mean(), **TOLERANCE)
    assert metrics["f1"] == pytest.approx(2 * hits / (2 * hits + misses), **TOLERANCE)
    known = ((found == right) | ~mask).all(1)[mask.any(1)]
    assert metrics["exact"] == pytest.approx(known.mean())


@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
def test_regression_honours_a_mask_of_leading_axes(shape):
    batch = {"x": X, "y": NUMBERS, "mask": MASKS[shape]}
    loss, metrics, outputs = both(functions("regression", batch, (2, 3)), batch)
    errors = (outputs.reshape(12, 2, 3) - NUMBERS[:12])[MASKS[shape][:12]]
    assert loss == pytest.approx((errors**2).mean(), **TOLERANCE)
    assert metrics["mse"] == metrics["loss"] == pytest.approx((errors**2).mean(), **TOLERANCE)
    assert metrics["mae"] == pytest.approx(np.abs(errors).mean(), **TOLERANCE)


def test_a_masked_label_or_output_has_no_gradient():
    for task, batch, shape in [
        ("multi_label", {"image": X, "labels": LABELS, "mask": MASKS[6,]}, (6,)),
        ("regression", {"x": X, "y": NUMBERS, "mask": MASKS[2, 3]}, (2, 3)),
    ]:
        made = functions(task, batch, shape)
        params, _ = made.init(jax.random.key(0))
        name = "labels" if task == "multi_label" else "y"
        gradient = jax.grad(lambda p, batch, made=made: made.loss_fn(p, batch)[0].total)
        changed = {**batch, name: np.where(batch["mask"], batch[name], 1 - batch[name])}
        np.testing.assert_array_equal(gradient(params, batch), gradient(params, changed))


TOKENS = {"tokens": np.zeros((EXAMPLES, 7), np.int32)}


@pytest.mark.parametrize(
    "task,batch,mask,message",
    [
        ("classification", {"image": X, "label": LABELS[:, 0]}, (5,),
         r"mask has shape \(13, 5\); expected \(13,\), the shape of the loss"),
        ("multi_label", {"image": X, "labels": LABELS}, (5,),
         r"mask has shape \(13, 5\); expected \(13, 6\) or its first axes, the shape of the loss"),
        ("regression", {"x": X, "y": NUMBERS}, (3,),
         r"mask has shape \(13, 3\); expected \(13, 2, 3\) or its first axes, the shape of the target"),
        ("regression", {"x": X, "y": NUMBERS}, (2, 3, 1), r"expected \(13, 2, 3\) or its first axes"),
        ("language_modelling", TOKENS, (7,), r"\(13, 7\); expected \(13, 6\) or its first axes"),
    ],
)  # fmt: skip
def test_a_mask_that_cannot_be_honoured_is_refused(task, batch, mask, message):
    batch = {**batch, "mask": np.ones((EXAMPLES, *mask), bool)}
    made = functions(task, batch, (2, 3) if task == "regression" else (6,))
    params, _ = made.init(jax.random.key(0))
    with pytest.raises(ValueError, match=message) as error:
        made.loss_fn(params, batch)
    assert len(str(error.value).splitlines()) == 1
    with pytest.raises(ValueError, match=message):
        made.metrics_fn(params, batch)


def test_a_mask_that_is_not_bool_is_refused_in_training_too():
    batch = {"image": X, "label": LABELS[:, 0], "mask": np.ones(EXAMPLES, np.int32)}
    made = functions("classification", batch, (6,))
    with pytest.raises(TypeError, match="the mask has dtype int32; expected an array of bool"):
        made.loss_fn(made.init(jax.random.key(0))[0], batch)
