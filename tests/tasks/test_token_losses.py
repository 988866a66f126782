"""The chunked cross-entropy: value and gradient against float64, and no whole array of logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.programs import equations

from jmp_train.tasks.token_losses import token_losses


def in_float64(x, table, targets, weights):
    """Losses, and the gradients of their weighted sum, by the closed form of softmax."""
    logits = x @ table.T
    logits -= logits.max(-1, keepdims=True)
    softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    rows = np.arange(len(x))
    error = softmax.copy()
    error[rows, targets] -= 1
    error *= weights[:, None]
    return -np.log(softmax[rows, targets]), error @ table, error.T @ x


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "chunk", [4, 64]
)  # with a chunk that is filled up, and one that is not full
def test_value_and_gradients_are_those_of_float64(dtype, chunk):
    rng = np.random.default_rng(0)
    x, table = (jnp.asarray(rng.normal(size=(n, 6)), dtype) for n in (10, 7))
    targets, weights = rng.integers(0, 7, 10), rng.uniform(0.5, 2, 10)

    def total(x, table):
        losses = token_losses(x, table, jnp.asarray(targets), chunk)
        return (losses * weights.astype(np.float32)).sum(), losses

    (_, losses), grads = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(x, table)
    exact = in_float64(*(np.asarray(y, np.float64) for y in (x, table)), targets, weights)
    assert losses.dtype == jnp.float32 and all(g.dtype == dtype for g in grads)
    # The losses are float32 for every dtype; gradients of order 4 have their errors rounded to
    # it once, and are rounded to it once themselves.
    np.testing.assert_allclose(losses, exact[0], atol=1e-5)
    eps = float(jnp.finfo(dtype).eps)
    for got, expected in zip(grads, exact[1:], strict=True):
        np.testing.assert_allclose(got.astype(jnp.float32), expected, atol=16 * eps + 1e-6)


def test_no_array_holds_the_logits_of_all_tokens():
    tokens, vocabulary, chunk = 2048, 512, 128
    x, table = jnp.zeros((tokens, 8), jnp.bfloat16), jnp.zeros((vocabulary, 8), jnp.bfloat16)
    targets = jnp.zeros(tokens, jnp.int32)
    total = jax.grad(lambda x, table: token_losses(x, table, targets, chunk).sum(), (0, 1))
    sizes = [v.aval.size for e in equations(jax.make_jaxpr(total)(x, table)) for v in e.outvars]
    assert max(sizes) == chunk * vocabulary
    memory = jax.jit(total).lower(x, table).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < tokens * vocabulary * 4 / 2


def test_a_chunk_longer_than_the_tokens_computes_no_more_than_they_need():
    x, table, targets = jnp.ones((5, 3)), jnp.ones((4, 3)), jnp.arange(5) % 4
    jaxpr = str(jax.make_jaxpr(lambda x: token_losses(x, table, targets, 1024))(x))
    assert "f32[5,4]" in jaxpr and "1024" not in jaxpr
