"""Digests: every flipped bit shows, and the number is that of a second algorithm."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jmp_train.records.digest import array_digests, json_digest

DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "uint32", "int32", "complex64"]


def in_python(words):
    """The sums in Python integers."""
    sums = []
    for start in (0x243F6A88, 0x85A308D3):
        total = 0
        for place, word in enumerate(words):
            x = word ^ (place * 0x9E3779B9 + start) % 2**32
            for shift, multiplier in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
                x = ((x ^ (x >> shift)) * multiplier) % 2**32
            total = (total + x) % 2**32
        sums.append(total)
    return "".join(f"{s:08x}" for s in sums)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_digest_is_the_sum_in_python_integers(dtype):
    bits = np.random.default_rng(0).integers(0, 256, 48, dtype=np.uint8)
    x = bits.view(np.dtype(getattr(ml_dtypes, dtype, dtype)))
    words = bits.view({1: np.uint8, 2: np.uint16}.get(x.dtype.itemsize, np.uint32)).tolist()
    # NaN patterns among them: nothing is read as a number.
    assert array_digests({"x": jnp.asarray(x)}) == {"x": in_python(words)}


@pytest.mark.parametrize("dtype", [np.uint32, np.uint16, np.uint8])
def test_every_flipped_bit_shows(dtype):
    x = np.random.default_rng(1).integers(0, np.iinfo(dtype).max, 16, dtype=dtype)
    digests = {array_digests([x])["0"]}
    for bit in range(x.nbytes * 8):
        flipped = x.view(np.uint8).copy()
        flipped[bit // 8] ^= 1 << bit % 8
        digests.add(array_digests([flipped.view(dtype)])["0"])
    assert len(digests) == 1 + x.nbytes * 8


def test_two_flipped_signs_show():
    x = np.arange(1.0, 13.0, dtype=np.float32)
    digests = {array_digests([x])["0"]}
    pairs = list(itertools.combinations(range(len(x)), 2))
    for pair in pairs:
        y = x.copy()
        y[list(pair)] *= -1
        digests.add(array_digests([y])["0"])
    assert len(digests) == 1 + len(pairs)


def test_keys_booleans_and_empty_arrays_have_digests_by_path():
    tree = {"key": jax.random.key(1), "flags": jnp.array([True, False]), "none": jnp.zeros((0, 3))}
    digests = array_digests(tree)
    assert list(digests) == ["flags", "key", "none"]
    assert digests["key"] == array_digests({"key": jax.random.key_data(tree["key"])})["key"]
    assert digests["flags"] != array_digests({"flags": jnp.array([False, True])})["flags"]


def test_two_values_that_change_places_show():
    x = np.arange(1.0, 9.0, dtype=np.float32)
    assert array_digests([x]) != array_digests([x[[1, 0, *range(2, 8)]]])


def test_json_by_content():
    assert json_digest({"a": [1, 2.5], "b": None}) == json_digest({"b": None, "a": [1, 2.5]})
    assert json_digest({"a": 1}) != json_digest({"a": 2})
    with pytest.raises(ValueError):
        json_digest(float("nan"))
