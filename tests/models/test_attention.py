"""Rotary positions against complex numbers, attention against float64, and what runs where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmp_train.models import attention


def rotary_by_complex_numbers(x, positions):
    """Float64: the pair (a, b) is a + ib, turned by exp(i position frequency)."""
    half = x.shape[-1] // 2
    z = x[..., :half] + 1j * x[..., half:]
    frequencies = 10000.0 ** (-np.arange(half) / half)
    z = z * np.exp(1j * positions[:, None] * frequencies)[:, None, :]
    return np.concatenate([z.real, z.imag], axis=-1)


@pytest.fixture(scope="module")
def qkv():
    return np.random.default_rng(0).normal(size=(3, 2, 12, 2, 8)).astype(np.float32)


def test_rotary_positions_are_a_turn_in_the_complex_plane(qkv):
    positions = np.arange(12) * 100
    got = jax.jit(attention.rotary)(jnp.asarray(qkv[0]), jnp.asarray(positions))
    # Float32 angles of up to 1,100 have an error of half an ulp, 2^-15, and so have the features.
    np.testing.assert_allclose(got, rotary_by_complex_numbers(qkv[0], positions), atol=2e-4)


def test_turned_products_depend_on_the_distance_alone(qkv):
    # In float64 the property is exact; float32 angles have an error of an ulp of the position.
    q, k = qkv[0][:1, :1], qkv[1][:1, :1]

    rotary = jax.jit(attention.rotary)

    def product(at_q, at_k):
        turned = [rotary(jnp.asarray(x), jnp.array([p])) for x, p in ((q, at_q), (k, at_k))]
        return np.einsum("bthk,bthk->h", *map(np.asarray, turned))

    exact = np.einsum("bthk,bthk->h", *(rotary_by_complex_numbers(x, np.array([p])) for x, p in ((q, 7), (k, 0))))  # fmt: skip
    for shift in (0, 5, 120):
        np.testing.assert_allclose(product(7 + shift, shift), exact, atol=2e-4)
    assert not np.allclose(product(8, 0), exact, atol=1e-2)


def attention_in_float64(q, k, v, mask):
    scores = np.einsum("bthk,bshk->bhts", *(x.astype(np.float64) for x in (q, k)))
    scores = np.where(mask, scores / np.sqrt(q.shape[-1]), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhts,bshk->bthk", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_causal_attention_is_the_float64_one(qkv, dtype):
    # An output is a weighted mean of values up to 4; scores and weights are rounded to `dtype`.
    q, k, v = (jnp.asarray(x, dtype) for x in qkv)
    got = jax.jit(attention.causal_attention)(q, k, v)
    expected = attention_in_float64(*map(np.asarray, (q, k, v)), np.tri(12, dtype=bool))
    assert got.dtype == dtype
    np.testing.assert_allclose(got.astype(jnp.float32), expected, atol=16 * jnp.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_comes_later_has_no_weight_at_all(qkv, dtype):
    """An output of a mean of values up to 4 would not show a weight of 10^-5; one of 10^4 here would."""
    q, k, v = (jnp.asarray(x, dtype) for x in qkv)
    attend = jax.jit(attention.causal_attention)
    later = jnp.arange(12)[:, None, None] >= 6
    want, got = attend(q, k, v), attend(q, jnp.where(later, -k, k), jnp.where(later, 1e4, v))
    np.testing.assert_array_equal(got[:, :6], want[:, :6])
    assert (got[:, 6:] != want[:, 6:]).any()


def test_each_device_and_dtype_has_its_attention(monkeypatch):
    class Gpu:
        compute_capability = "8.0"

    choose = attention._implementation
    monkeypatch.setattr(jax, "devices", lambda: [Gpu])
    for backend, dtype, features, expected in [
        ("cpu", jnp.float16, 64, "plain"),
        ("cpu", jnp.bfloat16, 64, None),
        ("gpu", jnp.float16, 64, "cudnn"),
        ("gpu", jnp.bfloat16, 64, "cudnn"),
        ("gpu", jnp.float32, 64, None),
        ("gpu", jnp.bfloat16, 36, "plain"),
        ("gpu", jnp.bfloat16, 256, "plain"),
        ("tpu", jnp.bfloat16, 64, "plain"),
    ]:
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        assert choose(jnp.dtype(dtype), features) == expected, (backend, dtype, features)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for capability in ("7.5", "gfx90a"):
        Gpu.compute_capability = capability
        assert choose(jnp.dtype(jnp.bfloat16), 64) == "plain"
