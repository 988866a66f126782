"""Mixup, CutMix and label smoothing against float64 NumPy, SciPy and the papers' own text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.marks import first_quick
from scipy import stats

import jmp_train as jt
from jmp_train import tasks, testing
from jmp_train.models import Model
from jmp_train.spec import DataSpec
from jmp_train.tasks import make_task
from jmp_train.tasks.mixing import Mixture, draw_mixture, mixed_inputs

SIZE, EXAMPLES = 12, 8
RNG = np.random.default_rng(0)
IMAGES = RNG.random((EXAMPLES, SIZE, SIZE, 1), np.float32)
BATCH = {"image": IMAGES, "label": np.arange(EXAMPLES, dtype=np.int32)}  # a label names its example
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}  # of sums of at most 144 float32 numbers of order 1
KEYS = jax.random.split(jax.random.key(1), 4000)


def linear():
    """A linear map without precision."""

    def init(key):
        return jax.random.normal(key, (SIZE * SIZE, EXAMPLES))

    return init, lambda w, x: x.reshape(len(x), -1) @ w


def functions(task, precision="float32", batch=BATCH):
    return make_task(Model(linear), task, DataSpec.of(batch, classes=EXAMPLES), precision)


def cross_entropy(logits, label):
    """In float64, of each example."""
    largest = logits.max(1, keepdims=True)
    total = np.log(np.exp(logits - largest).sum(1)) + largest[:, 0]
    return total - logits[np.arange(len(logits)), label]


def mixing(**options):
    augment = tasks.classification(**options).augment
    assert augment is not None
    return jax.jit(augment)


@pytest.mark.parametrize(
    "options", first_quick([{"mixup": 0.4, "cutmix": 1}, {"mixup": 0.4}, {"cutmix": 1.0}])
)
def test_loss_of_a_mixed_batch_equals_float64(options):
    run = functions(tasks.classification(**options))
    params, _ = run.init(jax.random.key(0))
    loss_fn, mix = jax.jit(run.loss_fn), mixing(**options)
    for number in range(5):
        key = jax.random.key(number)
        batch = mix(BATCH, key)
        share, one, two = (np.asarray(batch[f"label{x}"]) for x in (".share", "", ".other"))
        assert share.dtype == np.float32 and 0.5 <= share <= 1
        assert sorted(one) == sorted(two) == list(range(EXAMPLES))
        x, lam = IMAGES.astype(np.float64), np.float64(share)
        blend = lam * x[one] + (1 - lam) * x[two]
        if np.allclose(batch["image"], blend, atol=1e-6):
            assert "mixup" in options or share == 1  # an empty rectangle
        else:  # every pixel is of one of the two, in the share of the label
            assert "cutmix" in options
            blend = np.asarray(batch["image"], np.float64)
            of_one, of_two = blend == x[one], blend == x[two]
            assert (of_one | of_two).all()
            np.testing.assert_allclose(of_one[one != two].mean((1, 2, 3)), lam, rtol=1e-6)
        logits = blend.reshape(EXAMPLES, -1) @ np.asarray(params, np.float64)
        wanted = lam * cross_entropy(logits, one) + (1 - lam) * cross_entropy(logits, two)
        loss, metrics = loss_fn(params, BATCH, key=key)
        assert loss.dtype == jnp.float32
        np.testing.assert_allclose(loss, wanted.mean(), **ROUNDING)
        assert metrics["accuracy"] == pytest.approx((logits.argmax(1) == one).mean())


@pytest.mark.slow
def test_both_kinds_of_mixing_are_equally_frequent():
    mixtures = jax.vmap(lambda key: draw_mixture(key, IMAGES.shape, mixup=1.0, cutmix=1.0))(KEYS)
    constant = (mixtures.kept == mixtures.kept[:, :1, :1]).all((1, 2))
    whole = constant & ((mixtures.share == 0) | (mixtures.share == 1))  # an empty rectangle
    cuts = np.asarray(~constant | whole).mean()
    assert abs(cuts - 0.5) < 4 * 0.5 / len(KEYS) ** 0.5  # four standard errors


@pytest.mark.parametrize("alpha", first_quick([0.2, 1.0]))
def test_share_of_mixup_has_the_beta_distribution(alpha):
    share = jax.vmap(lambda key: draw_mixture(key, (4, 3), mixup=alpha).share)(KEYS)
    assert stats.kstest(np.asarray(share, np.float64), stats.beta(alpha, alpha).cdf).pvalue > 1e-3


@pytest.mark.slow
def test_mean_of_mixup_over_keys_is_its_expectation():
    mixed = jax.vmap(mixing(mixup=1.0), (None, 0))(BATCH, KEYS)
    images = np.asarray(mixed["image"], np.float64)
    x = IMAGES.astype(np.float64)
    error = images.std(0) / len(KEYS) ** 0.5
    assert (abs(images.mean(0) - (x + x.mean(0)) / 2) < 5 * error).all()


def test_partners_are_uniform_permutations():
    partner = np.asarray(jax.vmap(lambda key: draw_mixture(key, (4, 3), mixup=1.0).partner)(KEYS))
    counts = np.unique(partner, axis=0, return_counts=True)[1]
    assert len(counts) == 24 and stats.chisquare(counts).pvalue > 1e-3


def rectangle_of_the_paper(rng, height, width):
    """Algorithm A1 of CutMix with alpha 1: the share of the image outside the rectangle."""
    lam = rng.uniform()
    r_x, r_y = rng.integers(width), rng.integers(height)
    r_w, r_h = width * np.sqrt(1 - lam), height * np.sqrt(1 - lam)
    x1, x2 = np.clip([r_x - int(r_w / 2), r_x + int(r_w / 2)], 0, width)
    y1, y2 = np.clip([r_y - int(r_h / 2), r_y + int(r_h / 2)], 0, height)
    return 1 - (x2 - x1) * (y2 - y1) / (height * width)


def test_rectangles_of_cutmix_are_those_of_the_paper():
    shape = (2, 12, 20)
    mixtures = jax.vmap(lambda key: draw_mixture(key, shape, cutmix=1.0))(KEYS)
    kept, share = np.asarray(mixtures.kept), np.asarray(mixtures.share)
    np.testing.assert_allclose(share, kept.mean((1, 2)), rtol=1e-6)
    inside = kept == 0
    rows, columns = inside.any(2), inside.any(1)
    np.testing.assert_array_equal(inside, rows[:, :, None] & columns[:, None])
    for line in (rows, columns):  # in one piece
        assert (abs(np.diff(line, axis=1, prepend=False, append=False)).sum(1) <= 2).all()
    rng = np.random.default_rng(0)
    wanted = [rectangle_of_the_paper(rng, *shape[1:]) for _ in range(20_000)]
    pixels = [np.rint(np.asarray(x, np.float64) * 240) for x in (share, wanted)]
    assert stats.ks_2samp(*pixels).pvalue > 1e-3


def test_options_of_zero_leave_the_step_as_it_was():
    plain = tasks.classification()
    task = tasks.classification(mixup=0.0, cutmix=0.0, label_smoothing=0.0)
    assert task.augment is None and task.train_loss is None
    by_hand = jt.Task(
        loss=lambda logits, batch: optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), batch["label"]
        ),
        metrics=plain.metrics,
        inputs=("image",),
    )

    def jaxpr(task):
        run = functions(task, "mixed_bfloat16")
        step = jt.make_step(run.loss_fn, optax.sgd(0.1), run.precision, cast_batch=False)
        state = step.init(run.init(jax.random.key(0))[0], key=jax.random.key(1))
        return str(jax.make_jaxpr(step.pure_step)(state, BATCH))

    assert jaxpr(task) == jaxpr(by_hand)
    assert jaxpr(tasks.classification(mixup=0.2)) != jaxpr(by_hand)


def test_evaluation_and_prediction_do_not_mix():
    def jaxprs(task):
        run = functions(task)
        params = run.init(jax.random.key(0))[0]
        return [str(jax.make_jaxpr(f)(params, BATCH)) for f in (run.metrics_fn, run.predict_fn)]

    task = tasks.classification(mixup=0.2, cutmix=1.0, label_smoothing=0.1)
    assert jaxprs(task) == jaxprs(tasks.classification())


def stepper(task, policy="float32", **options):
    run = functions(task, policy)
    made = jt.make_step(run.loss_fn, optax.sgd(1e-3), run.precision, cast_batch=False, **options)
    return made, made.init(run.init(jax.random.key(0))[0], key=jax.random.key(1))


@pytest.mark.slow
def test_steps_mix_anew_without_another_compilation():
    made, state = stepper(tasks.classification(mixup=0.2, cutmix=1.0))
    losses = []
    batches = jax.tree.map(lambda x: np.stack([x] * 6), BATCH)
    with testing.assert_one_compilation(made.step) as step:
        for _ in range(6):
            state, info = step(state, BATCH)
            losses.append(float(info.loss))
    assert len(set(losses)) == 6
    again, state = stepper(tasks.classification(mixup=0.2, cutmix=1.0))
    batches = jax.tree.map(lambda x: np.stack([x] * 6), BATCH)
    assert again.scan(state, batches)[1].loss.tolist() == losses


@pytest.mark.slow
@testing.policies("float32", "mixed_bfloat16", "mixed_float16", "bf16", "float16")
def test_a_step_mixes_under_each_policy(policy):
    made, state = stepper(tasks.classification(mixup=1.0, label_smoothing=0.1), policy)
    _, info = made.step(state, BATCH)
    assert info.loss.dtype == jnp.float32 and np.isfinite(info.loss)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
def test_inputs_are_mixed_in_their_own_dtype(dtype):
    partner, lam = RNG.permutation(EXAMPLES), np.float32(0.3)
    out = mixed_inputs(jnp.asarray(IMAGES, dtype), Mixture(partner, lam, lam))
    assert out.dtype == dtype
    x = IMAGES.astype(dtype).astype(np.float64)
    wanted = np.float64(lam) * x + (1 - np.float64(lam)) * x[partner]
    # One rounding to the dtype, and the float32 ones before it.
    unit = float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(np.asarray(out, np.float64), wanted, rtol=unit + 3e-7)


def test_masked_examples_are_mixed_with_no_other():
    images = np.where(np.arange(EXAMPLES)[:, None, None, None] % 3 == 0, np.nan, IMAGES)
    mask = np.arange(EXAMPLES) % 3 != 0
    batch = {**BATCH, "image": images, "mask": mask}
    run, mix = functions(tasks.classification(mixup=1.0)), mixing(mixup=1.0)
    params, _ = run.init(jax.random.key(0))

    @jax.jit
    def loss_and_labels(key):
        made = mix(batch, key)
        return run.loss_fn(params, batch, key=key)[0], made["label"], made["label.other"]

    pairs = set()
    for number in range(60):
        loss, one, two = jax.tree.map(np.asarray, loss_and_labels(jax.random.key(number)))
        assert np.isfinite(loss.total) and loss.weight == mask.sum()
        np.testing.assert_array_equal(mask[one], mask[two])
        pairs |= set(zip(one[mask].tolist(), two[mask].tolist(), strict=True))
    assert len(pairs) == mask.sum() ** 2  # and each of the others with every other


@pytest.mark.slow
def test_each_micro_batch_has_its_own_share():
    made, state = stepper(tasks.classification(mixup=1.0), micro_batches=2)
    parts = [jax.tree.map(lambda x, n=n: x[n::2], BATCH) for n in (0, 1)]
    key = jax.random.fold_in(state.key, 0)
    loss_fn = functions(tasks.classification(mixup=1.0)).loss_fn
    losses = [
        loss_fn(state.params, part, key=jax.random.fold_in(key, n))[0]
        for n, part in enumerate(parts)
    ]
    np.testing.assert_allclose(made.step(state, BATCH)[1].loss, np.mean(losses), rtol=1e-5)


def test_label_smoothing_equals_the_smoothed_target_in_training_alone():
    run = functions(tasks.classification(label_smoothing=0.1))
    params, _ = run.init(jax.random.key(0))
    logits = IMAGES.reshape(EXAMPLES, -1).astype(np.float64) @ np.asarray(params, np.float64)
    target = np.eye(EXAMPLES)[BATCH["label"]] * 0.9 + 0.1 / EXAMPLES
    each = np.stack([cross_entropy(logits, np.full(EXAMPLES, c)) for c in range(EXAMPLES)], 1)
    np.testing.assert_allclose(
        run.loss_fn(params, BATCH)[0], (target * each).sum(1).mean(), **ROUNDING
    )
    held_out = run.metrics_fn(params, BATCH)["loss"]
    np.testing.assert_allclose(held_out, cross_entropy(logits, BATCH["label"]), **ROUNDING)


def test_all_inputs_of_mixup_have_the_same_partners():
    batch = {"a": np.eye(4, dtype=np.float32), "b": np.eye(4, dtype=np.float32) * 3, "label": BATCH["label"][:4]}  # fmt: skip
    out = mixing(inputs=("a", "b"), mixup=1.0)(batch, jax.random.key(0))
    np.testing.assert_allclose(out["b"], 3 * out["a"], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"mixup": -1.0}, "mixup is -1.0; expected 0 or a positive number"),
        ({"cutmix": float("nan")}, "cutmix is nan; expected 0 or a positive number"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0; expected 0 to below 1"),
        ({"cutmix": 1.0, "inputs": ("a", "b")}, "the inputs are a, b; expected one input, images"),
    ],
)
def test_wrong_options_are_one_line(options, line):
    with pytest.raises(ValueError, match=line):
        tasks.classification(**options)


@pytest.mark.parametrize(
    ("image", "line"),
    [
        (np.zeros((8, 3, 3), np.uint8), "'image' has dtype uint8; expected floating inputs"),
        (np.zeros((8, 9), np.float32), r"shape \(8, 9\); expected \(batch, height, width"),
    ],
)
def test_inputs_that_cannot_be_mixed_are_one_line(image, line):
    with pytest.raises(ValueError, match=line):
        mixing(cutmix=1.0)({**BATCH, "image": image}, jax.random.key(0))


def test_mixing_without_a_key_is_one_line():
    run = functions(tasks.classification(mixup=1.0))
    with pytest.raises(ValueError, match="called without a key; expected stepper.init"):
        run.loss_fn(run.init(jax.random.key(0))[0], BATCH)


def test_a_task_of_ones_own_changes_its_batches():
    def darker(batch, key):
        return {**batch, "image": batch["image"] * jax.random.uniform(key)}

    run = functions(dataclasses.replace(tasks.classification(), augment=darker))
    params, _ = run.init(jax.random.key(0))
    key = jax.random.key(4)
    plain = functions(tasks.classification()).loss_fn(params, darker(BATCH, key))[0]
    assert run.loss_fn(params, BATCH, key=key)[0] == plain
    with pytest.raises(ValueError, match="augment is 3; expected a function, or None"):
        dataclasses.replace(tasks.classification(), augment=3)
