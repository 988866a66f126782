"""Tasks on tokens: language modelling by logits or by scores, and sequence to sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jmp_train as jt
from jmp_train import tasks
from jmp_train.models import Model
from jmp_train.spec import DataSpec
from jmp_train.tasks import make_task

RNG = np.random.default_rng(0)
VOCABULARY, WIDTH, LENGTH = 11, 6, 7
TOKENS = RNG.integers(0, VOCABULARY, (4, LENGTH + 1)).astype(np.int32)
TABLE = RNG.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)


def mean_so_far(x, xp=jnp):
    """Mean over positions up to each one, (batch, length, width), the features turned by one."""
    return xp.roll(xp.cumsum(x, 1), 1, -1) / xp.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]


class Logits(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)

    def __call__(self, tokens):
        return self.embed.attend(mean_so_far(self.embed(tokens)))


class Scored(Logits):
    def score(self, tokens, loss):
        features = mean_so_far(self.embed(tokens[:, :-1])).reshape(-1, WIDTH)
        losses = loss(features, self.embed.embedding[...], tokens[:, 1:].reshape(-1), 5)
        return losses.reshape(tokens[:, 1:].shape)


class LinenLogits(linen.Module):
    @linen.compact
    def __call__(self, tokens):
        embed = linen.Embed(VOCABULARY, WIDTH, name="embed")
        return embed.attend(mean_so_far(embed(tokens)))


def lm(network):
    spec = DataSpec.of({"tokens": TOKENS}, classes=VOCABULARY)
    return make_task(Model(network), "language_modelling", spec, "float32")


PARAMS = {"embed": {"embedding": jnp.asarray(TABLE)}}


@pytest.mark.slow
@pytest.mark.parametrize("network", [Logits, LinenLogits])
def test_losses_and_gradients_from_logits_equal_those_of_score(network):
    # One softmax of 11 logits of order 5 in float32, in two orders of sums.
    assert jax.tree.map(jnp.shape, lm(network).init(jax.random.key(0))[0]) == {
        "embed": {"embedding": (VOCABULARY, WIDTH)}
    }
    batch = {"tokens": TOKENS}
    ours, scored = (lm(net).metrics_fn(PARAMS, batch) for net in (network, Scored))
    np.testing.assert_allclose(ours["loss"], scored["loss"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours["bits_per_byte"], ours["loss"] / np.log(2), rtol=1e-6)
    grads = []
    for task in (lm(network), lm(Scored)):
        grad, _ = jax.grad(task.loss_fn, has_aux=True)(PARAMS, batch)
        grads.append(grad["embed"]["embedding"])
    np.testing.assert_allclose(*grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("network", [Logits, LinenLogits])
def test_a_text_is_continued_by_calls_with_the_newest_window(network):
    table = TABLE.astype(np.float64)

    def continued(sees):
        text = [3, 1, 4]
        for _ in range(2 * LENGTH):
            features = mean_so_far(table[np.array(text[-sees:])][None], np)[0, -1]
            text.append(int((table @ features).argmax()))
        return text

    text = continued(LENGTH)
    assert text != continued(99)  # the window matters
    prompt, key = jnp.array([3, 1, 4]), jax.random.key(0)
    generate = lm(network).generate
    assert generate is not None
    out = generate(PARAMS, prompt, key, length=2 * LENGTH, temperature=0.0)
    assert out.tolist() == text[3:]


SOURCE = RNG.integers(1, VOCABULARY, (5, 4)).astype(np.int32)
TARGET = RNG.integers(1, VOCABULARY, (5, LENGTH + 1)).astype(np.int32)
TARGET[0, 4:], TARGET[1, 6:], TARGET[4, 2:] = 0, 0, 0  # shorter texts


def translate(scale: float = 1.0):
    """Logits of the source's mean and of the target so far, with two tables."""

    def init(key):
        tables = jax.random.normal(key, (2, VOCABULARY, WIDTH))
        return {"source": tables[0], "target": tables[1]}

    def apply(params, source, target):
        context = params["source"][source].mean(1, keepdims=True)
        so_far = jnp.roll(params["target"][target], 1, axis=-1)
        weights = 2.0 ** jnp.arange(target.shape[1])[:, None]  # later tokens weigh more
        features = jnp.cumsum(so_far * weights, 1) / weights + context
        return features @ params["target"].T * scale

    return init, apply


def logits_in_float64(params, source, target):
    params = {k: np.asarray(v, np.float64) for k, v in params.items()}
    context = params["source"][source].mean(0)
    features, out = np.zeros(WIDTH), []
    for token in target:
        features = features / 2 + np.roll(params["target"][token], 1)
        out.append(params["target"] @ (features + context))
    return np.array(out)


def seq2seq():
    spec = DataSpec.of({"source": SOURCE, "target": TARGET}, classes=VOCABULARY)
    task = make_task(Model(translate), "sequence_to_sequence", spec, "float32")
    return task, task.init(jax.random.key(1))[0]


@pytest.mark.parametrize("sizes", [(5,), (3, 2), (1, 3, 1)])
def test_token_accuracy_and_loss_are_exact_over_unequal_lengths_and_batches(sizes):
    task, params = seq2seq()
    right, losses = [], []
    for source, target in zip(SOURCE, TARGET, strict=True):
        logits = logits_in_float64(params, source, target[:-1])
        for row, token in zip(logits, target[1:], strict=True):
            if token:
                right.append(row.argmax() == token)
                losses.append(np.log(np.exp(row - row[token]).sum()))
    ends = np.cumsum(sizes)
    batches = [
        {"source": SOURCE[end - size : end], "target": TARGET[end - size : end]}
        for end, size in zip(ends, sizes, strict=True)
    ]
    evaluate = jt.make_evaluate(task.metrics_fn, task.precision, cast_batch=False)
    metrics = evaluate(params, batches)
    assert metrics["token_accuracy"] == pytest.approx(np.mean(right), abs=1e-12)
    # At most 30 losses of order 5 in float32.
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_greedy_decoding_equals_a_loop_over_positions():
    task, params = seq2seq()
    batch = {"source": SOURCE, "target": TARGET}
    got = jax.jit(task.predict_fn)(params, batch)["tokens"]
    for row, source, target in zip(got, SOURCE, TARGET, strict=True):
        text = [int(target[0])]  # the target's first token alone is read
        for _ in range(LENGTH):
            text.append(int(logits_in_float64(params, source, text)[-1].argmax()))
        assert row.tolist() == text[1:]
    changed = {"source": SOURCE, "target": np.where(np.arange(LENGTH + 1) > 0, 5, TARGET)}
    np.testing.assert_array_equal(task.predict_fn(params, changed)["tokens"], got)


def test_names_and_padding_of_sequence_to_sequence_are_arguments():
    own = tasks.sequence_to_sequence("question", "answer", padding=9)
    logits = jnp.zeros((1, 3, VOCABULARY))
    batch = {"answer": jnp.array([[1, 0, 2, 9]])}
    losses, weights = own.loss(logits, batch)
    assert weights.tolist() == [[True, True, False]]
    assert float(losses.sum() / weights.sum()) == pytest.approx(np.log(VOCABULARY))
    assert own.reads == ("question", "answer")
