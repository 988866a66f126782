"""Tasks against scikit-learn and NumPy: losses, metrics over unequal batches, predictions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.metrics import accuracy_score, f1_score, log_loss, mean_absolute_error

import jmp_train as jt
from jmp_train import tasks, testing
from jmp_train.models import Model
from jmp_train.spec import DataSpec
from jmp_train.tasks import make_task

# Sums of at most 60 float32 numbers of order 1, then float64.
ROUNDING = {"rel": 1e-5, "abs": 1e-6}
RNG = np.random.default_rng(0)
EXAMPLES = 13
X = RNG.normal(size=(EXAMPLES, 5)).astype(np.float32)
SIZES = [(13,), (5, 4, 3, 1), (12, 1)]


def linear(outputs: int = 3):
    """A linear map without precision."""

    def init(key):
        return jax.random.normal(key, (5, outputs))

    return init, lambda w, x: x @ w


def functions(batch, task, precision="float32", network=linear, classes=3, **arguments):
    spec = DataSpec.of(batch, classes=classes)
    return make_task(Model(network, **arguments), task, spec, precision)


def split(batch, sizes):
    """Batches of unequal sizes, each padded by examples that are masked and not finite."""
    at = 0
    for size in sizes:
        part = {name: array[at : at + size] for name, array in batch.items()}
        at += size
        short = max(sizes) - size
        fill = {k: np.full((short, *v.shape[1:]), np.nan if v.dtype.kind == "f" else 1, v.dtype) for k, v in part.items()}  # fmt: skip
        part = {k: np.concatenate([v, fill[k]]) for k, v in part.items()}
        yield {**part, "mask": np.arange(max(sizes)) < size}


def evaluated(task, params, batches):
    return jt.make_evaluate(task.metrics_fn, task.precision, cast_batch=False)(params, batches)


@pytest.mark.parametrize("sizes", SIZES)
def test_classification_equals_scikit_learn(sizes):
    batch = {"x": X, "y": RNG.integers(0, 3, EXAMPLES)}
    task = functions(batch, tasks.classification("x", "y"))
    params, state = task.init(jax.random.key(0))
    assert state is None
    logits = X.astype(np.float64) @ np.asarray(params, np.float64)
    odds = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    metrics = evaluated(task, params, split(batch, sizes))
    assert metrics["accuracy"] == pytest.approx(accuracy_score(batch["y"], odds.argmax(1)))
    assert metrics["loss"] == pytest.approx(
        log_loss(batch["y"], odds, labels=[0, 1, 2]), **ROUNDING
    )
    predicted = task.predict_fn(params, {"x": X})  # without the labels
    np.testing.assert_array_equal(predicted["class"], odds.argmax(1))
    np.testing.assert_allclose(predicted["probability"], odds, atol=1e-6)


@pytest.mark.parametrize("sizes", SIZES)
def test_multi_label_f1_and_exact_share_equal_scikit_learn(sizes):
    batch = {"image": X, "labels": RNG.integers(0, 2, (EXAMPLES, 3))}
    task = functions(batch, "multi_label")
    params, _ = task.init(jax.random.key(0))
    logits = X.astype(np.float64) @ np.asarray(params, np.float64)
    metrics = evaluated(task, params, split(batch, sizes))
    found = logits > 0
    assert metrics["f1"] == pytest.approx(f1_score(batch["labels"], found, average="micro"))
    assert metrics["exact"] == pytest.approx(accuracy_score(batch["labels"], found))
    odds = 1 / (1 + np.exp(-logits))
    loss = -np.where(batch["labels"] == 1, np.log(odds), np.log1p(-odds)).mean()
    assert metrics["loss"] == pytest.approx(loss, **ROUNDING)
    predicted = task.predict_fn(params, {"image": X})
    np.testing.assert_array_equal(predicted["labels"], found)
    np.testing.assert_allclose(predicted["probability"], odds, atol=1e-6)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("shape", [(3,), ()])
def test_regression_errors_equal_scikit_learn(sizes, shape):
    batch = {"x": X, "y": RNG.normal(size=(EXAMPLES, *shape)).astype(np.float32)}
    task = functions(batch, "regression", outputs=3 if shape else 1)
    params, _ = task.init(jax.random.key(0))
    exact = X.astype(np.float64) @ np.asarray(params, np.float64)
    metrics = evaluated(task, params, split(batch, sizes))
    wanted = batch["y"].reshape(EXAMPLES, -1)
    assert metrics["mae"] == pytest.approx(mean_absolute_error(wanted, exact), **ROUNDING)
    assert metrics["mse"] == pytest.approx(((wanted - exact) ** 2).mean(), **ROUNDING)
    assert metrics["loss"] == metrics["mse"]
    assert task.predict_fn(params, {"x": X})["value"].dtype == jnp.float32


@testing.policies("mixed_bfloat16", "bf16", "mixed_float16")
def test_targets_are_not_rounded_to_the_compute_dtype(policy):
    # 1.001 and 70,001 are no numbers of bfloat16; 70,001 is infinite in float16.
    targets = np.array([1.001, 70001.0], np.float32)
    batch = {"x": X[:2], "y": targets}
    task = functions(batch, "regression", policy, outputs=1)
    params, _ = task.init(jax.random.key(0))
    zero = jnp.zeros_like(params)  # so that the errors are the targets
    stepper = jt.make_step(task.loss_fn, optax.sgd(0.0), task.precision, cast_batch=False)
    _, info = stepper.step(stepper.init(jnp.copy(zero)), batch)
    exact = (targets.astype(np.float64) ** 2).mean()
    assert float(info.loss) == pytest.approx(exact, rel=1e-6)
    metrics = evaluated(task, zero, [batch])
    assert metrics["mae"] == pytest.approx(targets.astype(np.float64).mean(), rel=1e-6)


def test_a_custom_task_trains_and_is_evaluated():
    def pinball(outputs, batch):
        error = batch["price"] - outputs[:, 0]
        return jnp.maximum(0.9 * error, -0.1 * error)

    def covered(outputs, batch):
        return batch["price"] <= outputs[:, 0]

    def per_room(outputs, batch):
        return jnp.abs(batch["price"] - outputs[:, 0]), batch["rooms"]

    def of_two(wide: int = 4):
        init = lambda key: {"w": jnp.zeros(2), "b": jnp.zeros(())}
        apply = lambda p, rooms, area: (p["w"][0] * rooms + p["w"][1] * area + p["b"])[:, None]
        return init, apply

    rooms, area = RNG.uniform(1, 3, (2, 200)).astype(np.float32)
    noise = RNG.uniform(0, 1, 200).astype(np.float32)
    batch = {"rooms": rooms, "area": area, "price": rooms + 2 * area + noise}
    own = jt.Task(pinball, {"covered": covered, "per_room": per_room}, ("rooms", "area"), "price")
    assert own.targets == ("price",) and own.reads == ("rooms", "area", "price")
    task = functions(batch, own, network=of_two)
    stepper = jt.make_step(task.loss_fn, optax.adam(0.02), task.precision)
    state = stepper.init(task.init(jax.random.key(0))[0])
    for _ in range(600):
        state, _ = stepper.step(state, batch)
    metrics = evaluated(task, state.params, split(batch, (150, 50)))
    assert metrics["covered"] == pytest.approx(0.9, abs=0.05)  # the quantile of the loss
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), state.params)
    errors = np.abs(batch["price"] - (p["w"][0] * rooms + p["w"][1] * area + p["b"]))
    assert metrics["per_room"] == pytest.approx(errors.sum() / rooms.sum(), rel=1e-5)
    outputs = task.predict_fn(state.params, {"rooms": rooms, "area": area})
    assert list(outputs) == ["output"] and outputs["output"].shape == (200, 1)


def test_a_loss_of_the_whole_batch_trains_and_is_not_evaluated():
    own = jt.Task(lambda outputs, batch: jnp.square(outputs).max(), {"m": lambda o, b: o[:, 0]})
    task = functions({"x": X}, own)
    params, _ = task.init(jax.random.key(0))
    assert set(task.metrics_fn(params, {"x": X})) == {"m"}
    loss, aux = task.loss_fn(params, {"x": X})
    assert float(loss) == pytest.approx(float(jnp.square(X @ params).max())) and set(aux) == {"m"}


def test_masked_examples_have_no_gradient():
    batch = {"x": X, "y": RNG.normal(size=EXAMPLES).astype(np.float32)}
    task = functions(batch, "regression", outputs=1)
    params, _ = task.init(jax.random.key(0))
    one_step = lambda batch: jt.make_step(task.loss_fn, optax.sgd(0.1), "float32").step
    (padded,) = split({k: v[:9] for k, v in batch.items()}, (9,))
    padded = {k: np.concatenate([v, np.zeros_like(v[:2])]) for k, v in padded.items()}
    start = lambda: jt.make_step(task.loss_fn, optax.sgd(0.1), "float32").init(jnp.copy(params))
    got, _ = one_step(padded)(start(), padded)
    want, _ = one_step(batch)(start(), {k: v[:9] for k, v in batch.items()})
    np.testing.assert_allclose(got.params, want.params, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "task,message",
    [
        ("clasification", "the task is 'clasification'; did you mean 'classification'"),
        (3, "the task is 3; expected one of classification, .* or a jmp_train.Task"),
        ("regression", "the data have x and label; expected x and y, which regression reads"),
    ],
)
def test_a_wrong_task_is_one_line(task, message):
    with pytest.raises(ValueError, match=message) as error:
        functions({"x": X, "label": np.zeros(EXAMPLES, int)}, task)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"loss": 3}, "loss is 3; expected a function"),
        ({"metrics": [abs]}, "metrics are not a dict of functions"),
        ({"metrics": {"a": 1}}, "metrics are not a dict of functions"),
        ({"metric": "los"}, "metric is 'los'; expected one of loss"),
        ({"metrics": {"under/over": abs}}, r"name 'under/over'; expected 1 to 100 letters, digits"),
        ({"metrics": {"": abs}}, "name ''; expected 1 to 100 letters"),
        ({"metrics": {".hidden": abs}}, "name '.hidden'; expected 1 to 100 letters"),
        ({"metrics": {"a" * 101: abs}}, "name 'aa.*a'; expected 1 to 100 letters"),
        ({"metrics": {"two\nlines": abs}}, "expected 1 to 100 letters"),
        ({"metrics": {3: abs}}, "name 3; expected 1 to 100 letters"),
        ({"metrics": {"step": abs}}, "name 'step', which records use; expected .* loss_scale"),
        ({"metrics": {"last_loss": abs}}, "name 'last_loss', which records use; .* with last_"),
    ],
)
def test_a_wrong_field_of_a_task_is_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        jt.Task(**{"loss": abs, **fields})
    assert len(str(error.value).splitlines()) == 1


def test_names_of_metrics_may_have_words_and_marks():
    names = ["f1", "top 5", "recall.90", "F-score", "_own", "Größe"]
    assert list(jt.Task(abs, dict.fromkeys(names, abs)).metrics) == names


@pytest.mark.parametrize("policy", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["classification", "multi_label"])
def test_a_loss_is_computed_in_float32_from_narrow_logits(policy, name):
    outputs, key = ({"label": RNG.integers(0, 3, EXAMPLES)}, "label")
    if name == "multi_label":
        outputs, key = ({"labels": RNG.integers(0, 2, (EXAMPLES, 3))}, "labels")
    task = functions({"image": X, **outputs}, name, policy)
    params, _ = task.init(jax.random.key(0))
    # The logits as the network returns them: narrow operands, products rounded to the narrow dtype.
    narrow = task.precision.cast_to_compute(params)
    logits = np.asarray(narrow.dtype.type(X) @ narrow, np.float64)
    right = outputs[key]
    if name == "classification":
        exact = (np.log(np.exp(logits).sum(1)) - logits[np.arange(EXAMPLES), right]).mean()
    else:
        exact = (np.logaddexp(0, logits) - right * logits).mean()
    loss, _ = task.loss_fn(params, {"image": X, **outputs})
    # float32 sums; in bfloat16 or float16 the loss itself would be rounded by 2^-9 or 2^-11.
    assert loss.dtype == jnp.float32
    assert float(loss) == pytest.approx(exact, rel=2e-6)
    metrics = evaluated(task, params, [{"image": X, **outputs}])
    assert metrics["loss"] == pytest.approx(exact, rel=2e-6)


@pytest.mark.parametrize(
    "outputs,names",
    [
        (lambda x: x, ["output"]),
        (lambda x: (x, (x, x)), ["output.0", "output.1.0", "output.1.1"]),
        (lambda x: {"b": x, "a": {"c": x, "d": [x]}}, ["a.c", "a.d.0", "b"]),
    ],
)
def test_outputs_without_predict_are_named_by_their_places(outputs, names):
    def network():
        init, apply = linear()
        return init, lambda w, x: outputs(apply(w, x))

    task = functions({"x": X}, jt.Task(lambda o, batch: batch["x"]), network=network)
    params, _ = task.init(jax.random.key(0))
    predicted = task.predict_fn(params, {"x": X})
    assert sorted(predicted) == names
    assert all((x == X @ params).all() for x in predicted.values())


def test_two_outputs_of_one_name_are_refused():
    def network():
        init, apply = linear()
        return init, lambda w, x: {"a.b": apply(w, x), "a": {"b": x}}

    task = functions({"x": X}, jt.Task(lambda o, batch: batch["x"]), network=network)
    with pytest.raises(ValueError, match="two outputs have the name 'a.b'"):
        task.predict_fn(task.init(jax.random.key(0))[0], {"x": X})


@pytest.mark.parametrize(
    "task,batch,message",
    [
        ("multi_label", {"image": X, "labels": np.zeros((EXAMPLES, 4), int)},
         r"returned shape \(13, 3\) and 'labels' has \(13, 4\); expected equal shapes"),
        ("regression", {"x": X, "y": X[:, :2]},
         r"returned shape \(13, 3\) and 'y' has \(13, 2\); expected equal shapes"),
        ("language_modelling", {"tokens": np.zeros((4, 6), np.int32)},
         r"returned shape \(4, 3\); expected logits of shape \(4, 5, vocabulary\)"),
    ],
)  # fmt: skip
def test_outputs_of_a_wrong_shape_are_one_line(task, batch, message):
    made = functions(batch, task)
    params, _ = made.init(jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        made.loss_fn(params, batch)
