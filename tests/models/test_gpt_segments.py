"""Several documents in a row: each has the logits, losses and gradients that it has alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.marks import slow
from helpers.models import gpt

import jmp_train as jt
from jmp_train.data.packing import PackedRows
from jmp_train.models import attention
from jmp_train.models import gpt as gpt_file
from jmp_train.models.attention import Segments, masked_attention
from jmp_train.models.model import construct
from jmp_train.sources.tokens import ByteTokens, stream_of
from jmp_train.spec import DataSpec
from jmp_train.tasks import make_task
from tests.models.test_attention import attention_in_float64

CONFIG = gpt(width=16, depth=2, heads=2, loss_chunk=8)
SIZES = (5, 3, 4)  # tokens of the documents in a row
LENGTH = 14  # with padding
TOKENS = np.random.default_rng(0).integers(1, 256, (1, LENGTH + 1)).astype(np.uint8)
IDS = np.repeat([1, 2, 3, 0], (*SIZES, LENGTH - sum(SIZES)))[None].astype(np.int32)
STARTS = np.cumsum([0, *SIZES])
SPEC = DataSpec.of({"tokens": TOKENS}, classes=256)
QUICK = {"xla_backend_optimization_level": 0}


def task_of(policy="float32", config=CONFIG):
    return make_task(config, "language_modelling", SPEC, policy)


def large_params(config=CONFIG):
    # Larger than a model begins with, so that attention is far from even.
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(task_of(config=config).init, jax.random.key(0))[0]
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) / 2, shapes)


PARAMS = large_params()


@pytest.fixture(scope="module")
def logits():
    graph = nnx.split(nnx.eval_shape(lambda: construct(CONFIG, SPEC, rngs=nnx.Rngs(0))))[0]
    call = lambda tokens, segments=None: nnx.merge(graph, PARAMS)(tokens, segments)
    return jax.jit(call, compiler_options=QUICK)


def test_positions_begin_again_in_each_document():
    ids = jnp.array([[1, 1, 1, 2, 0, 0], [4, 4, 9, 9, 9, 9], [7, 8, 7, 7, 8, 8]])
    got = Segments.of(ids).positions_BxT
    np.testing.assert_array_equal(got, [[0, 1, 2, 0, 0, 1], [0, 1, 0, 1, 2, 3], [0, 0, 0, 1, 0, 1]])


def test_each_document_has_the_logits_that_it_has_alone(logits):
    tokens = TOKENS[:, :-1]
    packed = logits(tokens, IDS)
    scale = float(jnp.abs(packed).max())
    for start, size in zip(STARTS, SIZES, strict=False):
        alone = logits(tokens[:, start : start + size])
        np.testing.assert_allclose(packed[:, start : start + size], alone, atol=1e-5 * scale)
    # As one document, they differ from the second on.
    assert not np.allclose(packed[:, STARTS[1] : STARTS[3]], logits(tokens)[:, STARTS[1] : STARTS[3]], atol=0.1)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_the_loss_and_its_gradient_are_those_of_the_documents_alone(remat):
    task = task_of(config=dataclasses.replace(CONFIG, remat=remat))
    words = [b"one", b"longer", b"to be"]
    tokens = ByteTokens()
    rows = PackedRows(stream_of(words, tokens), LENGTH + 6, tokens.end, tokens.sizes).all()
    assert len(rows["tokens"]) == 1

    def loss(params, batch):
        loss, _ = task.loss_fn(params, batch)
        return loss.total, loss.weight

    total = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)
    (packed, weight), packed_grad = total(PARAMS, rows)
    assert int(weight) == sum(len(word) + 1 for word in words)

    def one_by_one(params):
        alone = 0.0
        for word in words:
            text = np.frombuffer(b"\0" + word + b"\0", np.uint8)[None]
            alone += task.metrics_fn(params, {"tokens": text})["loss"].sum()
        return alone

    alone, alone_grad = jax.jit(jax.value_and_grad(one_by_one), compiler_options=QUICK)(PARAMS)
    np.testing.assert_allclose(packed, alone, rtol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (packed_grad, alone_grad)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("dtype", ["float32", slow("bfloat16"), "float16"])
def test_no_gradient_crosses_documents(dtype):
    """Exactly zero: the weights of other documents are zeros, not small numbers."""
    rng = np.random.default_rng(2)
    qkv = [jnp.asarray(x, dtype) for x in rng.normal(size=(3, 1, LENGTH, 2, 8))]
    segments = Segments.of(jnp.asarray(IDS))

    @functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
    def gradients(number, qkv):
        mine = jnp.asarray(IDS == number)[..., None, None]
        out = lambda qkv: (
            (attention.causal_attention(*qkv, segments) * mine).astype("float32").sum()
        )
        return jax.grad(out)(qkv)

    for number in (1, 2, 3):
        for grad in gradients(number, qkv):
            by_token = np.abs(np.asarray(grad, np.float32)).max(axis=(2, 3))[0]
            assert (by_token[IDS[0] != number] == 0).all() and by_token[IDS[0] == number].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_attention_with_segments_is_the_float64_one(dtype):
    qkv = np.random.default_rng(3).normal(size=(3, 1, LENGTH, 2, 8))
    q, k, v = (jnp.asarray(x, dtype) for x in qkv)
    got = jax.jit(attention.causal_attention)(q, k, v, Segments.of(jnp.asarray(IDS)))
    mask = np.tri(LENGTH, dtype=bool) & (IDS[0][:, None] == IDS[0][None, :])
    expected = attention_in_float64(*map(np.asarray, (q, k, v)), mask)
    assert got.dtype == dtype
    np.testing.assert_allclose(got.astype(jnp.float32), expected, atol=16 * jnp.finfo(dtype).eps)


def test_segments_never_ask_for_the_fused_kernel(monkeypatch):
    asked = []
    original = jax.nn.dot_product_attention
    spy = lambda *args, **options: (asked.append(options["implementation"]), original(*args, **options))[1]  # fmt: skip
    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    monkeypatch.setattr(attention, "_implementation", lambda *_: "cudnn")
    x = jnp.ones((1, LENGTH, 2, 8), jnp.bfloat16)
    attention.causal_attention(x, x, x, Segments.of(jnp.asarray(IDS)))
    assert asked == ["xla"]


def rotary_before(x_BxTxHxK, positions_T, *, theta=10000.0):
    """As it was before segments."""
    half = x_BxTxHxK.shape[-1] // 2
    frequencies = theta ** (-np.arange(half) / half)
    angles_TxF = positions_T[:, None] * jnp.asarray(frequencies, jnp.float32)
    cos, sin = (f(angles_TxF)[:, None, :] for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x_BxTxHxK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return rotated.astype(x_BxTxHxK.dtype)


@jt.traced_in_half
def causal_attention(q, k, v, segments):
    """As it was before segments."""
    assert segments is None
    implementation = attention._implementation(q.dtype, q.shape[-1])
    if implementation != "plain":
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)
    position = jnp.arange(q.shape[1])
    return masked_attention(q, k, v, position[:, None] >= position[None, :])


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_a_step_without_segments_is_the_same_program_as_before(monkeypatch, policy):
    def program():
        task = task_of(policy, dataclasses.replace(CONFIG, dropout=0.1))
        grad = jax.grad(lambda p, key: task.loss_fn(p, {"tokens": TOKENS}, key=key)[0])
        return str(jax.make_jaxpr(grad)(PARAMS, jax.random.key(0)))

    now = program()
    assert "cummax" not in now
    monkeypatch.setattr(gpt_file, "rotary", rotary_before)
    monkeypatch.setattr(gpt_file, "causal_attention", causal_attention)
    assert program() == now


def test_a_network_without_segments_is_one_line():
    class Logits(nnx.Module):
        def __init__(self, *, rngs):
            self.embed = nnx.Embed(256, 4, rngs=rngs)

        def __call__(self, tokens):
            return self.embed.attend(self.embed(tokens))

    task = make_task(jt.Model(Logits), "language_modelling", SPEC, "float32")
    rows = {"tokens": TOKENS, "segments": IDS}
    with pytest.raises(ValueError, match="packed, and the network takes no argument 'segments'"):
        jax.eval_shape(lambda: task.metrics_fn(task.init(jax.random.key(0))[0], rows))
