"""Attention by blocks against float64, and against attention over all pairs at once."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.marks import first_quick, slow

from jmp_train.models.attention import (
    Segments,
    causal_attention,
    encoder_attention,
    masked_attention,
)
from jmp_train.models.blockwise import blockwise_attention

# Units of the dtype in the largest value: of products, and of the weights rounded before theirs.
TOLERANCES = {"float32": 2e-6, "bfloat16": 2e-2, "float16": 2.5e-3}


def draw(batch, length, heads, features, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    shape = (batch, length, heads, features)
    return [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(4)]


def exact(q, k, v, ids=None, causal=True):
    """In float64, over all pairs."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    length = q.shape[1]
    scores = np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(q.shape[-1])
    mask = np.tril(np.ones((length, length), bool), 0 if causal else length)[None, None]
    if ids is not None:
        mask = mask & (np.asarray(ids)[:, None, :, None] == np.asarray(ids)[:, None, None, :])
    scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhts,bshk->bthk", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("dtype", first_quick(TOLERANCES))
@pytest.mark.parametrize(
    "length,block", [(24, 8), slow(24, 24), slow(21, 8), slow(5, 8), slow(1, 4)]
)
def test_outputs_are_those_of_float64(length, block, dtype):
    q, k, v, _ = draw(2, length, 3, 4, dtype)
    out = blockwise_attention(q, k, v, block=block)
    assert out.dtype == dtype
    np.testing.assert_allclose(np.float64(out), exact(q, k, v), atol=TOLERANCES[dtype] * 4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("ids", [[[0] * 7 + [1] * 5 + [2] * 9, [3] * 21], slow(None)])
def test_gradients_are_those_of_attention_over_all_pairs(ids, causal):
    q, k, v, g = draw(2, 21, 3, 4)
    ids = None if ids is None else jnp.array(ids)
    mask = jnp.tril(jnp.ones((21, 21), bool), 0 if causal else 21)
    if ids is not None:
        mask = (mask & (ids[:, :, None] == ids[:, None, :]))[:, None]
    whole = jax.vjp(lambda *x: masked_attention(*x, mask), q, k, v)
    parts = jax.vjp(lambda *x: blockwise_attention(*x, ids, block=5, causal=causal), q, k, v)
    np.testing.assert_allclose(parts[0], whole[0], atol=2e-6)
    for a, b in zip(parts[1](g), whole[1](g), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_allclose(np.float64(parts[0]), exact(q, k, v, ids, causal), atol=4e-6)


@pytest.mark.parametrize("dtype", first_quick(TOLERANCES))
@pytest.mark.parametrize("length", [12, 128, 196, slow(300)])
def test_encoders_attend_to_all_positions_in_the_dtype_of_the_arguments(length, dtype):
    q, k, v, g = draw(2, length, 3, 8, dtype)
    out, back = jax.vjp(encoder_attention, q, k, v)
    assert out.dtype == dtype
    np.testing.assert_allclose(
        np.float64(out), exact(q, k, v, causal=False), atol=TOLERANCES[dtype] * 4
    )
    wide = [x.astype(jnp.float32) for x in (q, k, v, g)]
    expected = jax.vjp(lambda *x: jax.nn.dot_product_attention(*x), *wide[:3])[1](wide[3])
    for found, want in zip(back(g), expected, strict=True):
        np.testing.assert_allclose(np.float64(found), want, atol=TOLERANCES[dtype] * 4)


def kept_arrays(fn, *args):
    """Shapes of what the forward pass keeps for the backward pass."""
    return {x.shape for x in jax.tree.leaves(jax.vjp(fn, *args)[1])}


def test_encoders_keep_no_scores_for_the_backward_pass():
    q, k, v, _ = draw(2, 196, 3, 8)
    assert not any(shape[-2:] == (196, 196) for shape in kept_arrays(encoder_attention, q, k, v))
    plain = lambda q, k, v: jax.nn.dot_product_attention(q, k, v)
    assert any(shape[-2:] == (196, 196) for shape in kept_arrays(plain, q, k, v))


def test_large_scores_do_not_overflow():
    q, k, v, g = draw(1, 24, 2, 4)
    out, back = jax.vjp(lambda *x: blockwise_attention(*x, block=8), 60 * q, 60 * k, v)
    np.testing.assert_allclose(out, exact(60 * q, 60 * k, v), atol=1e-4)
    assert all(np.isfinite(x).all() for x in back(g))


def temporaries(attention, length):
    """Bytes of forward and backward pass of one head beside their arguments and results."""
    x = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.bfloat16)
    loss = lambda q, k, v: attention(q, k, v).astype(jnp.float32).sum()
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
    memory: Any = compiled.memory_analysis()
    return memory.temp_size_in_bytes


def test_memory_grows_with_the_length_and_not_with_its_square():
    mask = lambda n: np.tril(np.ones((n, n), bool))
    plain = lambda q, k, v: masked_attention(q, k, v, mask(q.shape[1]))
    short, long = (temporaries(blockwise_attention, n) for n in (2048, 8192))
    assert long <= 4.2 * short
    assert temporaries(plain, 2048) >= 10 * short  # 2,048 squared scores of four bytes and more
    assert long < 8192 * 8192  # of 8,192, not one byte for each pair


def test_long_rows_are_attended_to_by_blocks():
    q, k, v, _ = draw(1, 1024, 1, 8)
    text = str(jax.make_jaxpr(causal_attention)(q, k, v))
    assert "1024,1024" not in text
    segments = Segments.of(jnp.zeros((1, 1024), jnp.int32))
    text = str(jax.make_jaxpr(causal_attention)(q, k, v, segments))
    assert "1024,1024" not in text
    np.testing.assert_allclose(causal_attention(q, k, v), exact(q, k, v), atol=8e-6)
