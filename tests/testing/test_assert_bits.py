"""Trees are the same to the bit, or the message says where they differ and how."""

import re
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jmp_train.testing import assert_same_bits


def nan_with_payload(payload):
    (x,) = struct.unpack("<f", struct.pack("<I", 0x7FC00000 | payload))
    return np.array([x], np.float32)


@pytest.mark.parametrize(
    "tree",
    [
        {"w": np.float32([[1.0, np.nan], [-0.0, np.inf]]), "n": np.arange(3)},
        (jnp.ones((2, 3), jnp.bfloat16), [np.zeros(0, np.float16)], None),
        {"key": jax.random.key(7), "raw": jax.random.PRNGKey(7)},
        {"f8": np.arange(256).astype(np.uint8).view(ml_dtypes.float8_e4m3fn), "name": "adam"},
        np.array([1 + 2j, complex(np.nan, -0.0)]),
        {"step": 3, "rate": 0.1, "on": True},
        np.arange(12.0).reshape(3, 4).T,  # not contiguous
    ],
    ids=["float32", "bfloat16", "keys", "float8", "complex", "numbers", "transposed"],
)
def test_equal_trees_pass(tree):
    assert_same_bits(tree, jax.tree.map(lambda x: x.copy() if hasattr(x, "copy") else x, tree))


@pytest.mark.parametrize(
    "a,b,message",
    [
        (np.float32(0.0), np.float32(-0.0), "0.0 (0x00000000) and -0.0 (0x80000000)"),
        (nan_with_payload(1), nan_with_payload(2), "[0] nan (0x7fc00001) and nan (0x7fc00002)"),
        (jnp.ones(2, jnp.bfloat16), jnp.array([1.0, 1.0078125], jnp.bfloat16),
         "[1] 1 (0x3f80) and 1.00781 (0x3f81); 1 of 2 elements differ"),
        (np.arange(6).reshape(2, 3), np.arange(6).reshape(2, 3) * [[1], [-1]],
         "[1, 0] 3 (0x0000000000000003) and -3 (0xfffffffffffffffd); 3 of 6 elements differ"),
        (np.ones(2, np.float32), np.ones(2, np.float16), "float32[2] and float16[2]"),
        (np.ones(2, np.float32), np.ones((2, 1), np.float32), "float32[2] and float32[2,1]"),
        (np.ones(2, "<f4"), np.ones(2, ">f4"), "float32[2] and >f4[2]"),
        (jax.random.key(0), jax.random.key(1), "[1] 0 (0x00000000) and 1 (0x00000001)"),
        (jax.random.key(0), jax.random.PRNGKey(0), "key<fry>[] and uint32[2]"),
        (jax.random.key(0), jax.random.key(0, impl="rbg"), "key<fry>[] and key<rbg>[]"),
        ("adam", "sgd", "'adam' and 'sgd'"),
        ("adam", 1.0, "str and float64[]"),
    ],
)  # fmt: skip
def test_a_difference_is_described(a, b, message):
    with pytest.raises(AssertionError, match=re.escape(f"layers/0/w: {message}")):
        assert_same_bits({"layers": [{"w": a}]}, {"layers": [{"w": b}]})


def test_every_bit_of_every_16_bit_pattern_counts():
    patterns = np.arange(2**16, dtype=np.uint16)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        assert_same_bits(patterns.view(dtype), patterns.view(dtype).copy())
        for bit in range(16):
            flipped = (patterns ^ np.uint16(1 << bit)).view(dtype)
            with pytest.raises(AssertionError, match="65536 of 65536 elements differ"):
                assert_same_bits(patterns.view(dtype), flipped)


def test_another_structure_names_the_leaves_of_one_tree_alone():
    with pytest.raises(AssertionError, match="the same structure") as caught:
        assert_same_bits({"a": 1, "b": {"c": 2}}, {"a": 1, "d": 3})
    assert str(caught.value).splitlines()[1:] == [
        "  b/c: only in the first tree",
        "  d: only in the second tree",
    ]
    with pytest.raises(AssertionError, match="PyTreeDef"):
        assert_same_bits([1], (1,))


def test_at_most_ten_leaves_are_listed():
    a = {f"w{n:02}": np.float32(n) for n in range(13)}
    b = {name: x + 1 for name, x in a.items()}
    with pytest.raises(AssertionError, match="found 13 of 13 leaves") as caught:
        assert_same_bits(a, b)
    lines = str(caught.value).splitlines()
    assert len(lines) == 12 and lines[-1] == "  and 3 more"


class Pair:
    """A leaf whose == returns an array."""

    def __init__(self, second):
        self.second = second

    def __eq__(self, other):  # pyright: ignore[reportIncompatibleMethodOverride]
        return np.array([True, self.second == other.second])


@pytest.mark.parametrize(
    "a,equal,other",
    [
        (2**70, 2**70, 2**70 + 1),
        (-(2**63) - 1, -(2**63) - 1, -(2**63) - 2),
        (2**64 - 1, 2**64 - 1, 2**64),
        (
            np.array([2**70, "w"], object),
            np.array([2**70, "w"], object),
            np.array([1, "w"], object),
        ),
        (Pair(1), Pair(1), Pair(2)),
    ],
    ids=["wide", "negative", "uint64", "objects", "array_of_equality"],
)
def test_leaves_without_bits_are_compared_by_equality(a, equal, other):
    assert_same_bits([a], [equal])
    with pytest.raises(AssertionError, match="found 1 of 1 leaves that differ"):
        assert_same_bits([a], [other])


@pytest.mark.parametrize("empty", [{}, None, [(), {"a": None}]])
def test_trees_without_leaves_are_a_failure(empty):
    with pytest.raises(AssertionError, match="found nothing to compare"):
        assert_same_bits(empty, empty)


@pytest.mark.parametrize(
    "leaf,message",
    [
        (jax.ShapeDtypeStruct((2,), np.float32), "w/0 is a ShapeDtypeStruct, .* expected an array"),
        (np.ones(2, np.longdouble), "w/0 is .*float.*, whose bytes may be padded; .* float64"),
        (np.ones(2, np.clongdouble), "w/0 is .*complex.*, whose bytes may be padded"),
    ],
    ids=["shape", "longdouble", "clongdouble"],
)
def test_leaves_without_bits_to_compare_are_refused(leaf, message):
    for pair in [(leaf, leaf), (leaf, np.ones(2)), (np.ones(2), leaf)]:
        with pytest.raises(TypeError, match=message):
            assert_same_bits(*({"w": [x]} for x in pair))
