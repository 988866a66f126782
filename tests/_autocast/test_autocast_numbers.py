"""Numbers in the code, wider formats, the author's own wishes, arguments and results."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from helpers.arrays import rounded, through_product
from helpers.constructs import CONSTRUCTS
from helpers.programs import casts, operand_dtypes, product_dtypes
from jax import lax

import jmp_train as jt
from jmp_train.testing import assert_contractions_in


def test_a_number_in_the_code_adapts_to_its_operand():
    f = jt.autocast(lambda x: jnp.tanh((x @ x) * 0.5 + 1.0))
    assert operand_dtypes(f, "mul", jnp.ones((2, 2))) == [{"bfloat16"}]


@pytest.mark.parametrize("number", [1e-8, -1e30, 7e4])
def test_a_number_that_half_cannot_hold_widens_the_operation(number):
    f = lambda x: jnp.tanh(x @ x + number)
    x = jnp.ones((2, 2))
    assert operand_dtypes(jt.autocast(f, "float16"), "add", x) == [{"float32"}]
    assert operand_dtypes(jt.autocast(f, "bfloat16"), "add", x) == [{"bfloat16"}]


def test_a_masked_softmax_in_float16_has_no_infinite_mask():
    x = jnp.ones((2, 2))
    f = jt.autocast(lambda x: jax.nn.softmax(jnp.where(x > 5, x @ x, -1e30)), "float16")
    np.testing.assert_allclose(f(x), 0.5)


def test_softmax_of_a_half_product_is_that_of_float32():
    x = rounded((8, 16), low=-20, high=20)
    f = jt.autocast(through_product(jax.nn.softmax))
    assert operand_dtypes(f, "sub", x) == [{"float32"}]
    want = scipy.special.softmax(x.astype(np.float64), axis=-1)
    np.testing.assert_allclose(f(x), want, rtol=1e-5, atol=1e-12)


def test_layer_norm_of_a_half_product_is_that_of_float32():
    def layer_norm(h):
        mean, variance = h.mean(-1, keepdims=True), h.var(-1, keepdims=True)
        return (h - mean) * lax.rsqrt(variance + 1e-6)

    x = rounded((8, 64), low=9.0, high=11.0)
    wide = x.astype(np.float64)
    want = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(jt.autocast(through_product(layer_norm))(x), want, atol=1e-4)


def test_squares_are_float32_where_float16_would_overflow():
    x = jnp.full((2, 2), 300.0)
    f = jt.autocast(lambda x: jnp.sqrt(jnp.square(x @ jnp.eye(2))), "float16")
    np.testing.assert_allclose(f(x), 300.0)


def test_float64_is_left_alone():
    with jax.enable_x64(True):
        x = jnp.ones((2, 2), jnp.float64)
        f = jt.autocast(lambda x: jnp.exp(x @ x))
        assert_contractions_in(f, x, dtype="float64")
        assert operand_dtypes(f, "exp", x) == [{"float64"}]


def test_a_product_that_was_written_in_half_is_left_alone():
    x = jnp.ones((2, 2), jnp.bfloat16)
    assert_contractions_in(jt.autocast(lambda x: x @ x, "float16"), x)


def test_integers_and_complex_numbers_are_left_alone():
    n, z = jnp.ones((2, 2), jnp.int32), jnp.ones((2, 2), jnp.complex64)
    f = jt.autocast(lambda n, z: (n @ n, jnp.exp(z) @ z, jnp.abs(z)))
    assert [o.dtype.name for o in f(n, z)] == ["int32", "complex64", "float32"]


def test_a_preferred_element_type_wider_than_the_operands_is_kept():
    half = jnp.ones((2, 2), jnp.bfloat16)
    dot = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    f = jt.autocast(lambda a, b: jnp.tanh(dot(a, b)))
    assert operand_dtypes(f, "tanh", half, half) == [{"float32"}]
    with jax.enable_x64(True):
        wide = functools.partial(jnp.matmul, preferred_element_type=jnp.float64)
        single = jnp.ones((2, 2), jnp.float32)
        assert product_dtypes(jt.autocast(lambda a: wide(a, a)), single) == {"float64"}
    # jnp asks for float32 by itself where both operands are: that is nobody's wish
    full = jnp.ones((2, 2))
    assert operand_dtypes(f, "tanh", full, full) == [{"bfloat16"}]


@pytest.mark.parametrize(
    "precision", [lax.Precision.HIGHEST, lax.DotAlgorithmPreset.F32_F32_F32, "highest"]
)
def test_a_product_of_highest_precision_is_left_alone(precision):
    f = jt.autocast(lambda x: jnp.matmul(x, x, precision=precision))
    assert_contractions_in(f, jnp.ones((2, 2)), dtype="float32")


def test_the_authors_own_rounding_is_kept():
    x = jnp.full((2,), 1.001)
    f = jt.autocast(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32) * 1.0)
    np.testing.assert_array_equal(f(x), 1.0)


def test_a_bias_leaves_its_product_in_half_and_a_residual_does_not():
    x, w, b = jnp.ones((4, 8)), jnp.ones((8, 6)), jnp.full((6,), 0.001)
    biased = jt.autocast(lambda x, w, b: jnp.tanh(x @ w + b))
    assert operand_dtypes(biased, "tanh", x, w, b) == [{"bfloat16"}]
    residual = jt.autocast(lambda x, w, b: jnp.tanh(x @ w + b))
    assert operand_dtypes(residual, "tanh", x, w, jnp.ones((4, 6))) == [{"float32"}]


def test_the_gradient_of_a_bias_is_summed_in_float32():
    # 4096 ones: in bfloat16 the sum would stop at 256
    x, w, b = jnp.ones((4096, 2)), jnp.ones((2, 2)), jnp.zeros((2,))
    g = jax.grad(jt.autocast(lambda b: jnp.tanh(x * 0 @ w + b).sum()))(b)
    np.testing.assert_array_equal(g, 4096.0)


def test_only_known_compute_dtypes_and_functions_are_taken():
    with pytest.raises(ValueError, match="expected bfloat16, float16 or float32"):
        jt.autocast(jnp.sin, "float64")
    with pytest.raises(ValueError, match="did you mean 'bfloat16'"):
        jt.autocast(jnp.sin, "bfloat61")
    with pytest.raises(TypeError, match="write autocast"):
        jt.autocast(jnp.ones(2))  # type: ignore[type-var]
    with pytest.raises(TypeError, match="expected an OpRules"):
        jt.autocast(jnp.sin, rules={})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expects a dtype"):
        jt.with_precision(lambda x: x)


# Arguments and results.


def test_any_pytree_goes_in_and_comes_out_as_the_function_had_it():
    def f(tree, *, flag, name="x"):
        key = jax.random.split(tree["key"])[0]
        y = tree["w"] @ tree["w"] if flag else tree["w"]
        return {"y": y, "n": tree["n"] + 1, "name": name, "none": None, "key": key, "two": 2.0}

    tree = {"w": jnp.ones((2, 2)), "n": np.arange(2), "key": jax.random.key(0), "text": "t"}
    out = jt.autocast(f)(tree, flag=True)
    assert (out["name"], out["none"], out["two"]) == ("x", None, 2.0)
    assert out["y"].dtype == np.float32 and out["n"].dtype == np.int32
    assert jnp.issubdtype(out["key"].dtype, jax.dtypes.prng_key)


def test_outputs_keep_their_dtypes_and_weak_types():
    def f(x):
        with jt.with_precision("bfloat16"):
            weak = jnp.where(x[0, 0] > 0, 1.0, 2.0) * 2
        return x @ x, (x @ x).astype(jnp.float16), x[0, 0] > 0, jnp.sum(x) + 2, weak

    x = jnp.ones((2, 2))
    want, got = jax.eval_shape(f, x), jax.eval_shape(jt.autocast(f), x)
    assert want[-1].weak_type
    assert [(o.dtype, o.shape, o.weak_type) for o in got] == [
        (o.dtype, o.shape, o.weak_type) for o in want
    ]


def test_no_tracer_outlives_its_trace():
    with jax.checking_leaks():
        jax.jit(jax.grad(jt.autocast(CONSTRUCTS["scan"])))(jnp.ones((4, 4)), jnp.ones((2, 4)))


def test_in_float32_nothing_is_cast():
    x = jnp.asarray(rounded((4, 4)))
    f = lambda x: jax.nn.softmax(jnp.tanh(x @ x))
    assert casts(jt.autocast(f, "float32"), x) == 0
    np.testing.assert_array_equal(jt.autocast(f, "float32")(x), f(x))
