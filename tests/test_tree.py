"""Finiteness and selection of pytrees, over every 16-bit pattern."""

import math

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from absl.testing import parameterized
from helpers.loss_scales import (
    with_and_without_jit,
)

import jmp_train as jt
from jmp_train.testing import assert_same_bits


class AllFiniteTest(chex.TestCase):
    @with_and_without_jit
    @parameterized.parameters(
        "float16", "bfloat16", "float32", "complex64",
        "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
    )  # fmt: skip
    def test_one_bad_element_anywhere_is_found(self, name):
        dtype = getattr(jnp, name)
        all_finite = self.variant(jt.all_finite)
        good = jnp.ones((3, 4), dtype)
        bad = [jnp.nan] if name in FINITE_ONLY else [jnp.nan, jnp.inf, -jnp.inf]
        assert all_finite({"a": good, "b": [good]})
        for value in bad:
            assert not all_finite({"a": good, "b": [good.at[2, 3].set(value)]})
            assert not all_finite({"a": good.at[0, 0].set(value), "b": [good]})

    @with_and_without_jit
    def test_what_cannot_be_infinite_is_finite(self):
        tree = {"i": jnp.arange(3), "b": jnp.array([True]), "k": jax.random.key(0), "n": None}
        assert self.variant(jt.all_finite)(tree)
        assert self.variant(jt.all_finite)({"empty": jnp.zeros((0, 3))})

    @with_and_without_jit
    def test_an_infinite_imaginary_part_is_found(self):
        z = jnp.array([1 + 1j, complex(0, math.inf)], jnp.complex64)
        assert not self.variant(jt.all_finite)(z)

    @with_and_without_jit
    @parameterized.parameters(np.float16, ml_dtypes.bfloat16)
    def test_every_16_bit_pattern_is_judged_as_numpy_does(self, half):
        values = np.arange(2**16, dtype=np.uint16).view(half)
        got = self.variant(jax.vmap(jt.all_finite))(jnp.asarray(values))
        np.testing.assert_array_equal(got, np.isfinite(values.astype(np.float32)))


FINITE_ONLY = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2fnuz")


def test_trees_without_arrays_are_finite_and_python_numbers_count():
    assert jt.all_finite(None) and jt.all_finite({}) and jt.all_finite({"s": "text", "i": 3})
    assert not jt.all_finite({"x": math.nan}) and not jt.all_finite({"x": complex(math.inf)})
    assert jt.all_finite(()).shape == () and jt.all_finite(()).dtype == jnp.bool_


class SelectTest(chex.TestCase):
    @with_and_without_jit
    @parameterized.product(pred=(True, False), name=("float16", "bfloat16"))
    def test_every_16_bit_pattern_is_selected_bit_by_bit(self, pred, name):
        # Through float32 on a CPU, bfloat16 NaNs lose their payload: those are compared as NaNs.
        on_true = np.arange(2**16, dtype=np.uint16)
        on_false = on_true[::-1].copy()
        out = self.variant(jt.select_tree)(
            jnp.array(pred),
            jnp.asarray(on_true.view(getattr(jnp, name))),
            jnp.asarray(on_false.view(getattr(jnp, name))),
        )
        out, want = np.asarray(out), (on_true if pred else on_false)
        nan = np.isnan(want.view(out.dtype).astype(np.float32)) & (name == "bfloat16")
        np.testing.assert_array_equal(out.view(np.uint16)[~nan], want[~nan])
        assert np.isnan(out[nan].astype(np.float32)).all()

    @with_and_without_jit
    @parameterized.parameters(True, False)
    def test_any_tree_of_arrays_is_selected(self, pred):
        bits = np.array([0x7FC12345, 0xFF812345, 0x80000000, 1], np.uint32)  # NaNs, -0, subnormal

        def tree(i):
            return {
                "f": jnp.asarray(np.roll(bits, i).view(np.float32)),
                "i": jnp.array([i, 2**31 - 1 - i], jnp.int32),
                "b": jnp.array(bool(i)),
                "c": jnp.complex64(complex(-0.0, i)),
                "key": jax.random.split(jax.random.key(i), 2),
                "fp8": jnp.array(i, jnp.float8_e4m3fn),
                "n": None,
            }

        out = self.variant(jt.select_tree)(jnp.array(pred), tree(0), tree(1))
        want = tree(0 if pred else 1)
        assert_same_bits(out, want)


def test_select_takes_a_boolean_scalar_only():
    for pred in (jnp.array([True]), jnp.array(1), jnp.array(1.0)):
        with pytest.raises(AssertionError, match="expected boolean scalar"):
            jt.select_tree(pred, None, None)


def test_select_refuses_trees_that_differ():
    with pytest.raises(ValueError):
        jt.select_tree(True, {"a": jnp.ones(2)}, {"b": jnp.ones(2)})
    with pytest.raises(TypeError):
        jt.select_tree(True, jnp.ones(2), jnp.ones(2, jnp.bfloat16))
