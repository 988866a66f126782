"""`assert_close_to_float64`, against NumPy's float64 and ml_dtypes."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jmp_train.testing import assert_close_to_float64
from tests.helpers.arrays import through

RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 32)).astype(np.float32)
W = RNG.normal(size=(32, 8)).astype(np.float32)


def failure(*args, **kwargs):
    with pytest.raises(AssertionError) as error:
        assert_close_to_float64(*args, **kwargs)
    return str(error.value)


def scales(exact):
    """Return the magnitudes that errors are relative to."""
    magnitudes = np.sort(np.abs(exact[exact != 0]))
    return np.maximum(np.abs(exact), magnitudes[: -(len(magnitudes) // 4) or None][-1])


def units(message):
    return float(message.split("found ")[1].split(" u")[0])


@pytest.mark.parametrize("dtype, unit", [("float32", 24), ("float16", 11), ("bfloat16", 8)])
def test_one_rounding_is_within_one_unit_roundoff(dtype, unit):
    x = np.exp2(np.linspace(-3, 3, 4001)).astype(dtype)
    factor = np.asarray(0.7, dtype)
    scaled = lambda x: x * factor
    exact = x.astype(np.float64) * np.float64(factor)
    error = np.abs((x * factor).astype(np.float64) - exact)
    expected = (error / scales(exact)).max() * 2.0**unit
    assert 0.3 < expected <= 1
    assert_close_to_float64(scaled, x, ulps=1)
    assert_close_to_float64(scaled, x, ulps=expected * 1.001)
    message = failure(scaled, x, ulps=expected * 0.999)
    assert units(message) == pytest.approx(expected, rel=1e-2)


def test_the_worst_element_is_named():
    def fn(x):
        wrong = x.at[1, 2].set(jnp.bfloat16(x[1, 2]).astype(jnp.float32))
        return {"a": x * 0.7, "b": [x, wrong]}

    x = X.copy()
    x[1, 2] = 1 + 2.0**-9
    message = failure(fn, x, ulps=2)
    assert ": 1.0 instead of 1.001953125 at b/1[1, 2]. " in message
    assert units(message) == pytest.approx(2.0**15 / scales(np.float64(x))[1, 2], rel=1e-2)


def test_a_product_in_bfloat16_is_judged_by_bfloat16():
    product = lambda x, w: x @ w
    low = np.float32(X.astype(ml_dtypes.bfloat16)) @ np.float32(W.astype(ml_dtypes.bfloat16))
    exact = X.astype(np.float64) @ W.astype(np.float64)
    expected = (
        np.abs(low - exact) / scales(exact)
    ).max() + 2.0**-8  # of the result, which XLA may skip
    assert_close_to_float64(product, X, W, policy="mixed_bfloat16", ulps=expected * 2**8)
    assert_close_to_float64(product, X, W, policy="mixed_bfloat16", rtol=expected)
    message = failure(product, X, W, policy="mixed_bfloat16", ulps=0.5 * (expected * 2**8 - 1))
    assert "of bfloat16" in message
    failure(product, X, W, policy="mixed_bfloat16", rtol=0.5 * (expected - 2.0**-8))
    with jax.default_matmul_precision("highest"):  # a GPU may compute float32 products in TF32
        assert_close_to_float64(product, X, W, ulps=64)


def test_small_elements_are_judged_by_the_size_of_their_leaf():
    def residual(x):  # the first element cancels to about 2^-24, a rounding error of its leaf
        return jnp.stack([(x[0] + x[1]) - x[0], x[2]])

    x = np.array([1, 3e-8, 1], np.float32)
    assert_close_to_float64(residual, x, ulps=1)
    message = failure(lambda x: residual(x)[0], x, ulps=1)
    assert "found 1.68e+07 u: 0.0 instead of 2.99" in message


def test_the_size_of_a_leaf_is_that_without_its_largest_quarter():
    low = through
    x = np.array([0, 1 + 2.0**-9, 2, 4, 0, 100, 200, 300, 400], np.float32)  # seven are not zero
    message = failure(low, x, ulps=1)  # 300 and 400 are exact in bfloat16, and 100 and 200
    assert units(message) == pytest.approx(2.0**15 / 300, rel=1e-2)
    assert units(failure(low, x[:3], ulps=1)) == pytest.approx(2.0**15 / 2, rel=1e-2)
    assert_close_to_float64(low, np.zeros(3, np.float32), ulps=0)


@pytest.mark.parametrize("outlier", [1e9, -1e30])
def test_one_huge_element_hides_no_errors(outlier):
    x = np.linspace(0.1, 2, 64, dtype=np.float32)
    low = lambda x: through(x).at[3].set(outlier)
    assert units(failure(low, x, ulps=4)) > 2**14
    assert_close_to_float64(lambda x: (x * 1.1).at[3].set(outlier), x, ulps=1)


def test_sparse_results_are_judged_by_what_is_not_zero():
    fn = lambda x: jnp.zeros(1000).at[7:11].set((x[0] + x[1:5]) - x[0])
    x = np.array([1, 3e-8, 1, 1, 1], np.float32)
    assert_close_to_float64(fn, x, ulps=1)


@pytest.mark.parametrize("fn", [lambda x: 3, lambda x: x[:0], lambda x: None])
def test_a_function_that_returns_nothing_to_compare_fails(fn):
    assert "found no array with an element among the results" in failure(fn, X, ulps=1)


def test_an_outlier_hides_no_errors_of_other_elements():
    def fn(x):
        return jnp.concatenate([x[:1] * 1e3, x[1:].astype(jnp.bfloat16).astype(jnp.float32)])

    x = np.linspace(1, 2, 4001, dtype=np.float32)
    message = failure(fn, x, ulps=8)  # the error of bfloat16 is up to 2^16 units of float32
    assert units(message) > 2000


def test_the_operation_that_loses_most_is_named():
    def loss(x, w):
        with jax.named_scope("head"):
            logits = (x @ w) * 30
            logits = logits.astype(jnp.bfloat16)  # loses most: the errors are multiplied by exp
            logits = jax.lax.optimization_barrier(logits)  # on a GPU too
        return jax.nn.softmax(logits.astype(jnp.float32))

    line = loss.__code__.co_firstlineno + 3
    message = failure(loss, X, W, rtol=1e-3)
    assert "Worst operation: convert_element_type in bfloat16 (head; " in message
    assert f"{__file__}:{line} (" in message


def test_operations_are_ranked_by_their_effect_on_the_result():
    def fn(x):  # bfloat16 has the larger error, and hardly any effect
        return through(x) * 1e-6 + through(x, jnp.float16)

    message = failure(fn, X, ulps=64)
    assert "Worst operation: convert_element_type in float16 (" in message


def test_the_worst_operation_inside_a_loop_is_named():
    def total(x):
        return jax.lax.scan(lambda c, v: (c + v, None), jnp.bfloat16(0), x)[0]

    x = np.full(600, 1, ml_dtypes.bfloat16)  # the sum stops at 256
    message = failure(total, x, ulps=2)
    assert "256.0 instead of 600.0 at result. Worst operation: add in bfloat16 (scan; " in message
    assert units(message) == pytest.approx(344 / 600 * 256, rel=1e-2)


def test_the_effect_of_the_worst_operation_is_its_own():
    def fn(x):
        y = through(x)
        return (y * y)[0]

    x = np.array([1 + 2.0**-8 + 2.0**-12], np.float32)  # rounds up to 1 + 2^-7
    expected = ((1 + 2.0**-7) ** 2 - float(x[0]) ** 2) / float(x[0]) ** 2
    message = failure(fn, x, rtol=1e-6)
    assert message.endswith(f"alone make {expected:.3g}")
    assert "convert_element_type" in message


def test_the_worst_operation_on_complex_numbers_is_named():
    message = failure(lambda x: (x + 1j) * (x - 0.3j), X, ulps=0.01)
    assert "Worst operation: mul in complex64 (" in message


def test_the_worst_operation_beside_a_key_is_named():
    both = lambda x, key: jax.lax.optimization_barrier((x.astype(jnp.bfloat16), key))
    assert_close_to_float64(both, X, jax.random.key(0), rtol=2.0**-8)
    message = failure(both, X, jax.random.key(0), rtol=1e-6)
    assert "Worst operation: convert_element_type in bfloat16 (" in message


def test_the_worst_operation_beside_a_ref_is_named():
    def fn(x):
        ref = jax.new_ref(x)
        ref[...] = through(ref[...])
        return ref[...] * 3

    message = failure(fn, X, ulps=64)
    assert "Worst operation: convert_element_type in bfloat16 (" in message


def test_samples_in_half_precision_have_no_errors():
    noisy = lambda x: x + jax.random.normal(jax.random.key(3), x.shape, x.dtype)
    assert_close_to_float64(noisy, jnp.zeros((64, 64), jnp.bfloat16), ulps=2)


def test_a_result_that_only_the_program_overflows_fails():
    square = lambda x: (x.astype(jnp.float16) ** 2).astype(jnp.float32)
    assert_close_to_float64(square, np.float32([255.0]), ulps=2**14)
    assert "inf instead of 90000.0" in failure(square, np.float32([300.0]), ulps=2**14)
    assert "inf instead of 90000.0" in failure(square, np.float32([300.0]), rtol=1e9)


def test_infinities_and_nan_of_the_reference_pass():
    assert_close_to_float64(lambda x: jnp.log(x), np.float32([0, 1, np.inf, np.nan, -1]), ulps=2)
    hidden = lambda x: jnp.where(jnp.isfinite(x * x), x, jnp.nan)
    assert "nan instead of 1.0000000150474662e+30" in failure(hidden, np.float32([1e30]), rtol=1)


def test_integers_must_be_equal():
    x = np.float32([2049.0, 2048.0])
    index = lambda x: {"index": jnp.argmax(x.astype(jnp.float16)), "same": jnp.arange(3)}
    assert_close_to_float64(lambda x: jnp.argmax(x), x, ulps=0)
    assert_close_to_float64(index, x[::1], ulps=0)
    message = failure(index, x[::-1].copy(), ulps=0)  # a tie in float16
    assert message == "assert_close_to_float64: expected equal int32; found 0 instead of 1 at index"


def test_the_process_stays_in_32_bits():
    x = jnp.ones(3)
    assert_close_to_float64(jnp.sum, x, ulps=1)
    failure(lambda x: jnp.sum(x.astype(jnp.bfloat16) * 1.1), x, rtol=1e-5)
    with pytest.raises(ZeroDivisionError):
        assert_close_to_float64(lambda x: x * (1 / 0), x, ulps=1)
    assert not jax.config.jax_enable_x64
    assert jnp.asarray(np.float64(1)).dtype == jnp.float32


def test_arguments_that_are_no_arrays_reach_the_function():
    fn = lambda x, mode, scale: x * scale if mode == "double" else x.astype(jnp.bfloat16)
    assert_close_to_float64(fn, X, "double", 2.0, ulps=0)
    failure(fn, X, "half", 2.0, rtol=1e-5)
    text = np.array(["a"], np.dtypes.StringDType())
    for other in (text, np.array(["a"]), np.array([None]), np.datetime64("2020-01-01")):
        assert_close_to_float64(
            lambda x, y, same=other: x if y is same else 1 / 0, X, other, ulps=0
        )


@pytest.mark.parametrize("policy", [None, "mixed_bfloat16"])
def test_what_cannot_be_run_is_named(policy):
    with pytest.raises(
        TypeError, match=r"^assert_close_to_float64 expects a function, got 3; write"
    ):
        assert_close_to_float64(3, X, policy=policy, ulps=1)
    shape = jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)
    with pytest.raises(TypeError, match=r"values.*, such as jnp.ones\(\(2, 3\), 'bfloat16'\)$"):
        assert_close_to_float64(jnp.sum, shape, policy=policy, ulps=1)


def test_a_ref_from_outside_is_an_error():
    ref = jax.new_ref(jnp.ones(3))
    with pytest.raises(TypeError, match="expected a function without state.*jax.new_ref in the f"):
        assert_close_to_float64(lambda x: ref[...] * x, X[0, :3], ulps=1)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({}, "ulps is None and rtol is None; expected one of the two"),
        ({"ulps": 1, "rtol": 1}, "ulps is 1 and rtol is 1; expected one of the two"),
        *(({"ulps": x}, f"ulps is {x}; expected a finite") for x in (-1, np.nan, np.inf)),
        *(({"rtol": x}, f"rtol is {x}; expected a finite") for x in (-1, np.nan, np.inf)),
        ({"ulps": 1, "policy": "bfloat17"}, "did you mean 'bfloat16'"),
        ({"ulps": 1, "policy": [("**", "bf16")]}, "expected one policy, such as 'mixed_bfloat16'"),
    ],
)
def test_wrong_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        assert_close_to_float64(jnp.sum, X, **kwargs)
