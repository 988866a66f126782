"""Casts touch floating arrays only, and a policy's text parses back to it."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jmp_train as jt

DTYPES = ("float16", "bfloat16", "float32")


@pytest.mark.parametrize("p,c,o", list(itertools.product(DTYPES, repeat=3)))
def test_text_of_a_policy_parses_back_to_it(p, c, o):
    policy = jt.Policy(p, c, o)
    assert jt.get_policy(str(policy)) == policy
    assert hash(jt.get_policy(str(policy))) == hash(policy)


def test_every_bf16_pattern_casts_to_f32_as_ml_dtypes_does():
    bits = np.arange(2**16, dtype=np.uint16)
    values = bits.view(ml_dtypes.bfloat16)
    got = np.asarray(jt.cast_to_full(jnp.asarray(values)))
    np.testing.assert_array_equal(got, values.astype(np.float32))


def test_non_floating_leaves_pass_through_as_the_same_object():
    tree = {"i": jnp.arange(3), "k": jax.random.key(0), "n": None, "s": "x", "o": object()}
    out = jt.get_policy("f16").cast_to_compute(tree)
    assert all(out[k] is tree[k] for k in tree)


def test_a_leaf_already_in_the_dtype_is_not_copied():
    x = jnp.ones(3, jnp.float32)
    assert jt.get_policy("f32").cast_to_param(x) is x


@pytest.mark.parametrize(
    "text,words",
    [("c=float17", "float16"), ("mixed_bfloat61", "mixed_bfloat16"), ("copmute=f16", "compute")],
)
def test_a_misspelling_names_the_nearest_valid_word(text, words):
    with pytest.raises(ValueError, match=f"did you mean '{words}'"):
        jt.get_policy(text)
