"""Casts touch floating arrays only and round as IEEE does; a policy's text parses back to it."""

import itertools
import pickle
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

import jmp_train as jt
from jmp_train.policy.policy import POLICY_NAMES
from jmp_train.testing import strategies
from jmp_train.tree import cast_floating

HALVES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
FORMATS = ("float16", "bfloat16", "float32", "float64", *FLOAT8)
PATTERNS = np.arange(2**16, dtype=np.uint16)
ANY_FLOAT32 = strategies.floats("float32") | strategies.special_values("float32")
with_and_without_jit: Any = partial(chex.variants, with_jit=True, without_jit=True)
everywhere: Any = partial(with_and_without_jit, with_device=True, without_device=True)


def assert_same_numbers(got, want):
    """Equal bit for bit (so -0.0 is not 0.0), except that any NaN equals any other."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.dtype == want.dtype and got.shape == want.shape
    got_nan, want_nan = np.isnan(got.astype(np.float64)), np.isnan(want.astype(np.float64))
    np.testing.assert_array_equal(got_nan, want_nan)
    bits = np.dtype(f"u{got.dtype.itemsize}")
    np.testing.assert_array_equal(got.view(bits)[~got_nan], want.view(bits)[~want_nan])


def ties(half):
    """Around every midpoint of neighbouring 16-bit magnitudes: x just below, on it, just above,
    and the pattern that each rounds to, ties to even. The last midpoint is the overflow threshold.

    >>> x, patterns = ties(np.float16)
    >>> float(x[1, -1]), [hex(p) for p in patterns[:, -1]]
    (65520.0, ['0x7bff', '0x7c00', '0x7c00'])
    """
    infinity = int(np.array(np.inf, half).view(np.uint16))
    low = np.arange(infinity, dtype=np.uint16)
    value = np.append(low.view(half).astype(np.float64), 2.0 ** (int(ml_dtypes.finfo(half).maxexp)))
    middle = ((value[:-1] + value[1:]) / 2).astype(np.float32)  # exact: one bit more than `half`
    zero, inf = np.float32(0), np.float32(np.inf)
    x = np.stack([np.nextafter(middle, zero), middle, np.nextafter(middle, inf)])
    return x, np.stack([low, low + (low & 1), low + 1])


class CastTest(chex.TestCase):
    @everywhere
    @parameterized.product(half=HALVES, to=(*HALVES, np.dtype(np.float32)))
    def test_every_16_bit_pattern_casts_as_numpy_does(self, half, to):
        values = PATTERNS.view(half)
        with np.errstate(all="ignore"):
            got = self.variant(partial(cast_floating, dtype=to))(values)
            assert_same_numbers(got, values.astype(np.float32).astype(to))

    @everywhere
    @parameterized.product(half=HALVES, sign=(1, -1))
    def test_float32_rounds_to_nearest_and_ties_to_even(self, half, sign):
        x, patterns = ties(half)
        x = sign * x
        patterns = patterns | np.uint16(0x8000 if sign < 0 else 0)
        with np.errstate(over="ignore"):
            got = np.asarray(self.variant(partial(cast_floating, dtype=half))(x))
            np.testing.assert_array_equal(got.view(np.uint16), patterns)
            assert_same_numbers(x.astype(half), patterns.view(half))  # the oracles agree

    @everywhere
    @parameterized.parameters(*HALVES)
    def test_float32_patterns_cast_as_numpy_does(self, half):
        rng = np.random.default_rng(0)
        x = rng.integers(0, 2**32, 2**18, dtype=np.uint32).view(np.float32)
        with np.errstate(all="ignore"):
            got = self.variant(partial(cast_floating, dtype=half))(x)
            assert_same_numbers(got, x.astype(half))

    @with_and_without_jit
    def test_only_floating_leaves_change_dtype(self):
        tree = {
            "w": jnp.ones(2),
            "i": jnp.arange(3),
            "b": jnp.array([True]),
            "c": jnp.ones(2, jnp.complex64),
            "raw": jax.random.key_data(jax.random.key(0)),
            "key": jax.random.key(0),
            "n": None,
        }
        out = self.variant(jt.get_policy("f16").cast_to_compute)(tree)
        assert out["w"].dtype == jnp.float16
        for name in ("i", "b", "c", "raw", "key"):
            assert out[name].dtype == tree[name].dtype
            assert bool((out[name] == tree[name]).all())
        assert out["n"] is None


@settings(max_examples=200, deadline=None)
@given(strategies.arrays("float32", (8,), elements=ANY_FLOAT32), st.sampled_from(HALVES))
def test_any_float32_casts_as_numpy_does(x, half):
    with np.errstate(all="ignore"):
        want = x.astype(half)
        assert_same_numbers(cast_floating(x, half), want)
        assert_same_numbers(cast_floating(jnp.asarray(x), half), want)


@settings(max_examples=100, deadline=None)
@given(strategies.trees(), st.sampled_from(HALVES))
def test_a_cast_of_a_tree_is_the_cast_of_its_floating_leaves(tree, half):
    done = cast_floating(tree, half)
    assert jax.tree.structure(done) == jax.tree.structure(tree)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(done), strict=True):
        if x.dtype.kind in "iub":
            assert y is x
        else:
            with np.errstate(all="ignore"):
                assert_same_numbers(y, x.astype(half))


@pytest.mark.parametrize(
    "leaf",
    [None, "text", b"bytes", True, 3, 2.5, 1j, object(), np.arange(3), np.int8(1), np.True_]
    + [np.array(["a"]), np.array([None, 1], object), np.zeros(2, [("a", "f4")]), np.complex64(1j)],
    ids=lambda leaf: type(leaf).__name__,
)
def test_any_other_leaf_is_the_same_object(leaf):
    tree = {"a": leaf}
    for policy in map(jt.get_policy, ("f16", "bf16", "f32")):
        assert policy.cast_to_param(tree)["a"] is leaf
        assert policy.cast_to_compute(tree)["a"] is leaf
        assert policy.cast_to_output(tree)["a"] is leaf
    assert jt.cast_to_full(tree)["a"] is leaf and jt.cast_to_half(tree)["a"] is leaf


def test_typed_and_raw_prng_keys_are_the_same_object():
    typed, raw = jax.random.key(0), jax.random.PRNGKey(0)
    assert jt.cast_to_half(typed) is typed
    assert jt.cast_to_half(raw) is raw


@pytest.mark.parametrize("numpy", [np, jnp], ids=["numpy", "jax"])
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", *FLOAT8])
def test_a_leaf_already_in_the_dtype_is_not_copied(numpy, name):
    x = numpy.ones(3, getattr(jnp, name))
    assert cast_floating(x, name) is x
    assert jt.get_policy(name).cast_to_param([x])[0] is x


@pytest.mark.parametrize("to", ["f16", "bf16", "f32"])
def test_numpy_stays_numpy_and_jax_stays_jax(to):
    assert type(cast_floating(np.ones(3, np.float64), to)) is np.ndarray
    assert isinstance(cast_floating(np.float64(1), to), np.generic)
    assert isinstance(cast_floating(jnp.ones(3), to), jax.Array)


def test_each_cast_goes_to_its_own_dtype():
    policy = jt.Policy("f16", "bf16", "float8_e5m2")
    x = {"x": jnp.ones(2)}
    assert policy.cast_to_param(x)["x"].dtype == jnp.float16
    assert policy.cast_to_compute(x)["x"].dtype == jnp.bfloat16
    assert policy.cast_to_output(x)["x"].dtype == jnp.float8_e5m2
    assert jt.cast_to_full(policy.cast_to_param(x))["x"].dtype == jnp.float32
    assert jt.cast_to_half(x)["x"].dtype == jt.half_dtype()


def test_with_output_dtype_changes_only_the_output():
    policy = jt.get_policy("p=f32,c=f16,o=f16").with_output_dtype("f32")
    assert policy == jt.get_policy("mixed_float16")


@pytest.mark.parametrize("param", FORMATS)
def test_text_of_a_policy_parses_back_to_it(param):
    for compute, output in itertools.product(FORMATS, repeat=2):
        policy = jt.Policy(param, compute, output)
        again = jt.get_policy(str(policy))
        assert again == policy and hash(again) == hash(policy)
        assert again.param_dtype == getattr(jnp, param)
        assert again.compute_dtype == getattr(jnp, compute)
        assert again.output_dtype == getattr(jnp, output)


def test_equal_policies_are_one_policy_however_they_are_written():
    ways = {
        jt.Policy(jnp.float32, jnp.bfloat16, jnp.float32),
        jt.Policy(np.float32, np.dtype(jnp.bfloat16), np.dtype("float32")),
        jt.Policy("full", "bf16", "f32"),
        jt.get_policy("mixed_bfloat16"),
        jt.get_policy("o=f32,c=bf16"),
        pickle.loads(pickle.dumps(jt.get_policy("bf16-mixed"))),
    }
    assert len(ways) == 1


def test_equal_policies_as_static_arguments_compile_once():
    @partial(jax.jit, static_argnums=0)
    @chex.assert_max_traces(n=2)
    def apply(policy, x):
        return policy.cast_to_compute(x)

    chex.clear_trace_counter()
    for policy in (jt.get_policy("c=bf16"), jt.Policy(np.float32, "bfloat16", jnp.bfloat16)):
        assert apply(policy, jnp.ones(2)).dtype == jnp.bfloat16
    assert apply(jt.get_policy("c=f16"), jnp.ones(2)).dtype == jnp.float16  # the second trace
    apply(jt.get_policy("params=full,compute=half"), jnp.ones(2))


def test_a_policy_is_returned_unchanged():
    policy = jt.get_policy("bf16")
    assert jt.get_policy(policy) is policy


# The grammar, against google-deepmind/jmp itself.

JMP_NAMES = ("bf16", "bfloat16", "f16", "float16", "full", "f32", "float32", "f64", "float64")
JMP_KEYS = (("p", "params"), ("c", "compute"), ("o", "output"))


def jmp_strings():
    names = (*JMP_NAMES, "half")
    yield from names
    slots = [[None, *(f"{k}={n}" for k in keys for n in names)] for keys in JMP_KEYS]
    for items in itertools.product(*slots):
        if any(items):
            yield ",".join(filter(None, items))
    few = [[f"{keys[1]}={n}" for n in ("half", "bf16", "f32")] for keys in JMP_KEYS]
    for items in itertools.product(*few):
        for size in (2, 3):
            yield from map(",".join, itertools.permutations(items, size))


def test_every_string_of_jmps_grammar_means_what_it_means_to_jmp():
    jmp = pytest.importorskip("jmp")
    texts = list(jmp_strings())
    assert len(texts) > 9_000
    for text in texts:
        ours, theirs = jt.get_policy(text), jmp.get_policy(text)
        assert ours.param_dtype == np.dtype(theirs.param_dtype), text
        assert ours.compute_dtype == np.dtype(theirs.compute_dtype), text
        assert ours.output_dtype == np.dtype(theirs.output_dtype), text
        assert jt.get_policy(str(theirs)) == ours, text
        assert jmp.get_policy(str(ours)) == theirs, text


@pytest.mark.parametrize(
    "name,p,c,o",
    [
        ("mixed_bfloat16", "float32", "bfloat16", "float32"),
        ("mixed_float16", "float32", "float16", "float32"),
        ("bf16-mixed", "float32", "bfloat16", "float32"),
        ("16-mixed", "float32", "float16", "float32"),
        ("bf16-true", "bfloat16", "bfloat16", "bfloat16"),
        ("16-true", "float16", "float16", "float16"),
        ("32-true", "float32", "float32", "float32"),
        ("64-true", "float64", "float64", "float64"),
        ("bfloat16", "bfloat16", "bfloat16", "bfloat16"),
        ("  c = bf16 , o = f32 ", "float32", "bfloat16", "float32"),
        (" bf16\n", "bfloat16", "bfloat16", "bfloat16"),
    ],
)
def test_presets_and_the_names_that_keras_and_lightning_users_type(name, p, c, o):
    policy = jt.get_policy(name)
    assert (policy.param_dtype.name, policy.compute_dtype.name, policy.output_dtype.name) == (
        p,
        c,
        o,
    )


def test_every_valid_policy_name_parses():
    for name in POLICY_NAMES:
        assert isinstance(jt.get_policy(name), jt.Policy)


@pytest.mark.parametrize(
    "text,message",
    [
        ("c=float17", "Unknown dtype 'float17' in policy 'c=float17'; did you mean 'float16'?"),
        ("mixed_bfloat61", "Unknown dtype or policy 'mixed_bfloat61'; did you mean 'mixed_bfloat16'"),
        ("16-mixd", "Unknown dtype or policy '16-mixd'; did you mean '16-mixed'?"),
        ("bf61", "Unknown dtype or policy 'bf61'; did you mean 'bf16'?"),
        ("copmute=f16", "Unknown key 'copmute' in policy 'copmute=f16'; did you mean 'compute'?"),
        ("parms=f16", "Unknown key 'parms' in policy 'parms=f16'; did you mean 'params'?"),
        ("p=f32,c", "Key 'c' in policy 'p=f32,c' has no dtype; write c=bf16"),
        ("p=f32,params=f16", "Key 'params' is given twice in policy 'p=f32,params=f16'"),
        ("p=f32,", "Unknown key '' in policy 'p=f32,'; expected one of p, params, c, compute"),
        ("", "Unknown dtype or policy ''; expected one of auto, mixed_bfloat16"),
    ],
)  # fmt: skip
def test_a_wrong_policy_gets_the_words_that_set_it_right(text, message):
    with pytest.raises(ValueError) as error:
        jt.get_policy(text)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("value", [None, 16, jnp.float16, ["bf16"]])
def test_what_is_neither_text_nor_policy_is_a_type_error(value):
    with pytest.raises(TypeError, match="expected a policy string such as 'mixed_bfloat16'"):
        jt.get_policy(value)


WORDS = st.sampled_from(
    [*POLICY_NAMES, "p", "c", "o", "params", "compute", "output", "=", ",", " "]
)


@settings(max_examples=500, deadline=None)
@given(st.text(max_size=40) | st.lists(WORDS | st.text(max_size=3), max_size=8).map("".join))
def test_any_text_parses_or_is_refused_in_one_line(text):
    try:
        policy = jt.get_policy(text)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1 and str(error)
    else:
        assert jt.get_policy(str(policy)) == policy
