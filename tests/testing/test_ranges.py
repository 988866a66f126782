"""`assert_no_overflow` and `assert_no_underflow`, against the limits of the formats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas

from jmp_train.testing import assert_no_overflow, assert_no_underflow

EYE = np.eye(4, dtype=np.float32)


def overflow(*args, **kwargs):
    with pytest.raises(AssertionError, match="^assert_no_overflow: expected values") as error:
        assert_no_overflow(*args, **kwargs)
    return str(error.value)


def underflow(*args, **kwargs):
    with pytest.raises(AssertionError, match="^assert_no_underflow: expected at most") as error:
        assert_no_underflow(*args, **kwargs)
    return str(error.value)


def of_product(op):
    """Return `op` of a product, which autocast computes in half precision."""
    return lambda x: op(x @ EYE)


# Values around the limit: 65,519 rounds to 65,504, and 65,520 to infinity.
@pytest.mark.parametrize(
    "dtype, inside, outside",
    [("float16", 65519.0, 65520.0), ("bfloat16", 3.3895e38, 3.3963e38), ("float32", 3.4e38, None)],
)
def test_casts_overflow_above_the_limit(dtype, inside, outside):
    x = np.zeros((2, 4), np.float32)
    x[1, 2] = -inside
    assert_no_overflow(of_product(lambda y: y), x, dtype=dtype)
    if outside is not None:
        x[1, 2] = -outside
        message = overflow(of_product(lambda y: y), x, dtype=dtype)
        assert (
            f"found {outside:.4g} (1 of 8 values overflow) in convert_element_type in {dtype} ("
            in message
        )


def test_a_sum_of_squares_is_named_with_its_place_and_magnitude():
    def loss(x):
        h = x @ EYE
        with jax.named_scope("encoder/norm"):
            return jnp.mean(h * h, dtype=jnp.float32)

    x = np.full((2, 4), 300, np.float32)
    assert_no_overflow(loss, x / 2)
    assert_no_overflow(loss, x, dtype="bfloat16")
    assert_no_overflow(loss, x, dtype="float32")
    message = overflow(loss, x)
    line = loss.__code__.co_firstlineno + 3
    assert "expected values within float16 (largest 65504); found 9e+04 (8 of 8 " in message
    assert f"overflow) in mul in float16 (encoder/norm; {__file__}:{line} (" in message


def test_a_function_as_it_stands_is_tested_in_its_own_dtypes():
    squares = lambda x: jnp.mean(jnp.square(x.astype(jnp.float16)))
    x = np.array([1.0, 255.0], np.float32)
    assert_no_overflow(squares, x, dtype=None)
    x = np.array([400.0] + 7 * [1.0], np.float32)
    assert_no_overflow(squares, x, dtype="float16")  # autocast squares in float32
    assert "their dtypes; found 1.6e+05 (1 of 8 values overflow) in square in float16" in overflow(
        squares, x, dtype=None
    )
    assert "found no operation" in str(
        pytest.raises(AssertionError, assert_no_overflow, lambda n: n + 1, 3, dtype=None).value
    )


def test_complex_numbers_overflow_by_their_parts():
    product = lambda x, y: jnp.abs(x * y)
    x = np.full(4, 2e19j, np.complex64)
    message = "found 4e+38 (4 of 8 values overflow) in mul in complex64 ("
    for dtype in (None, "float32"):
        assert_no_overflow(product, x, x.imag / 2, dtype=dtype)
        assert message in overflow(product, x, x.imag, dtype=dtype)
    infinite = np.complex64(np.inf)
    assert "the number (inf+0j) in the code" in overflow(lambda x: x * infinite, x, dtype=None)


def test_complex_numbers_underflow_by_their_parts():
    product = lambda x, y: x * y
    x = np.full(4, 1e-30j, np.complex64)
    assert_no_underflow(product, x, np.complex64(1), dtype="float32")
    message = underflow(product, x, x.imag, dtype="float32")
    assert "found 1 (4 of 4, up to 1e-60) in mul in complex64 (" in message


def test_an_overflow_that_nothing_reads_is_found():
    def masked(x):
        y = x @ EYE
        return jnp.where(y < 200, y * y, y).astype(jnp.float32)

    assert np.isfinite(masked(np.full((1, 4), 300, np.float32))).all()
    assert "in mul in float16" in overflow(masked, np.full((1, 4), 300, np.float32))


def test_infinities_that_were_written_pass():
    def attention(x):
        scores = jnp.where(np.tri(4, dtype=bool), x @ x.T, -jnp.inf)
        return jax.nn.softmax(scores) @ x

    assert_no_overflow(attention, EYE)
    assert_no_overflow(of_product(jnp.exp), np.float32([[np.inf, np.nan, 0, 1]]))
    assert_no_overflow(of_product(lambda y: y / jnp.zeros_like(y)), EYE)  # not an overflow


# Each is infinite in float32, before autocast can cast it, and the last two in float64 too.
BEYOND = {
    "exp": (jnp.exp, 90.0, "1.22e+39 (4 of 4 values overflow) in exp in float32"),
    "integer_pow": (lambda x: x**20, 300.0, "3.487e+49 (4 of 4 values overflow) in integer_pow in"),
    "cosh": (jnp.cosh, 300.0, "9.712e+129 (4 of 4 values overflow) in cosh in float32"),
    "pow": (lambda x: jnp.power(x, x), 150.0, "more than 1.8e+308 (4 of 4 values overflow) in pow in"),
    "exp of more": (jnp.exp, 800.0, "more than 1.8e+308 (4 of 4 values overflow) in exp in float32"),
}  # fmt: skip


@pytest.mark.parametrize("name", BEYOND)
def test_an_overflow_beyond_wider_formats_is_found(name):
    fn, value, found = BEYOND[name]
    assert_no_overflow(fn, np.full(4, 1.5, np.float16))
    assert f"found {found}" in overflow(fn, np.full(4, value, np.float16))
    assert f"found {found}".partition(" in ")[0] in overflow(
        fn, np.full(4, value, np.float16), dtype=None
    )


def test_poles_and_given_infinities_are_no_overflow():
    x = np.float16([0.0, -np.inf, np.inf, 2.0])
    with np.errstate(divide="ignore"):
        for fn in (jnp.exp, jnp.log, jnp.cumsum, lambda x: x**-2, lambda x: x ** jnp.float16(-2.5)):
            for dtype in ("float16", None):
                assert_no_overflow(fn, x, dtype=dtype)


@pytest.mark.parametrize(
    "name, fn", [("exp", lambda x: jnp.exp(-300 * x)), ("mul", lambda x: x**40)]
)
def test_an_underflow_beyond_wider_formats_is_found(name, fn):
    x = np.full(4, 1e-3 if name == "mul" else 1.0, np.float16)
    assert_no_underflow(fn, np.full(4, 1e-3 if name == "exp" else 1.0, np.float16))
    message = underflow(fn, x)
    assert (
        "found 1 (4 of 4, up to " in message
        and "in convert_element_type in float16 of the" in message
    )
    in_float32 = lambda x: fn(x.astype(jnp.float32)) + 0 * x.astype(jnp.float32)
    assert_no_underflow(lambda x: (in_float32(x), x * 2), x)  # it is never cast


def test_a_cast_of_what_a_jitted_function_returns_names_its_operation():
    x = np.full(400, 300.0, np.float16)
    assert "16 of the result of cumsum in float32 (jit:cumsum; " in overflow(
        lambda x: jnp.cumsum(x), x
    )


def test_loops_and_backward_passes_are_entered():
    def grow(x):
        return jax.lax.fori_loop(0, 5, lambda i, c: c @ (8 * EYE), x)

    assert_no_overflow(grow, EYE)  # 8^5 = 32,768
    assert "in dot_general in float16 (scan; " in overflow(lambda x: grow(x), 2 * EYE)
    loss = lambda x: jnp.sum(grow(x) * 1e-4) * 1e4
    overflow(jax.grad(loss), EYE * 4)


def test_float32_is_compared_with_float64():
    assert_no_overflow(jnp.exp, np.float32([88.0]), dtype="float32")
    message = overflow(jnp.exp, np.float32([89.0]), dtype="float32")
    assert "found 4.49e+38 (1 of 1 values overflow) in exp in float32" in message


# 2^-25 and less rounds to zero in float16.
def test_underflow_begins_at_half_of_the_smallest_subnormal():
    cast = of_product(lambda y: y)
    assert_no_underflow(cast, np.full((1, 4), 2.0**-25 * 1.001, np.float32))
    message = underflow(cast, np.full((1, 4), 2.0**-25, np.float32))
    assert "found 1 (4 of 4, up to 2.98e-08) in convert_element_type in float16 (" in message


def test_the_share_is_of_values_that_are_not_zero():
    x = np.float32([[1e-9, 1, 0, 0], [1, 1, 0, 0]])
    cast = of_product(lambda y: y)
    assert_no_underflow(cast, x, share=0.25)
    assert "found 0.25 (1 of 4, up to 1e-09)" in underflow(cast, x, share=0.2499)
    assert "expected at most 0.001 of" in underflow(cast, x)
    assert_no_underflow(cast, x, dtype="bfloat16")
    assert_no_underflow(cast, np.zeros((2, 4), np.float32))


def test_gradients_underflow_without_a_loss_scale():
    def grads(w, scale):
        return jax.grad(lambda w: scale * 1e-5 * jnp.mean((EYE * 1e-3) @ w))(w)

    assert_no_underflow(grads, EYE, np.float32(2**16), share=0.5)
    assert "in float16 (" in underflow(grads, EYE, np.float32(1), share=0.5)


def test_the_first_operation_is_named():
    def program(x):
        y = x @ EYE
        a = y * y  # 1e-10: zero in float16
        return a, y * y * y

    line = program.__code__.co_firstlineno + 2
    message = underflow(program, np.full((1, 4), 1e-5, np.float32))
    assert f"in mul in float16 ({__file__}:{line} (" in message


@pytest.mark.parametrize("check", [assert_no_overflow, assert_no_underflow])
def test_an_unknown_format_is_an_error(check):
    with pytest.raises(ValueError, match="did you mean 'float16'"):
        check(jnp.sum, EYE, dtype="float17")
    check(lambda x, name: x @ x if name else 1 / 0, EYE, "name")  # leaves that are not arrays


@pytest.mark.parametrize("check", [assert_no_overflow, assert_no_underflow])
def test_a_function_with_nothing_in_the_format_fails(check):
    squares = lambda x: (x * x).sum()  # autocast leaves it in float32
    with pytest.raises(
        AssertionError, match="found no operation with a result in float16: autocast"
    ):
        check(squares, np.full(4, 100, np.float32))
    check(squares, np.full(4, 10, np.float16))
    assert "in mul in float16" in overflow(squares, np.full(4, 300, np.float16))


@pytest.mark.parametrize("check", [assert_no_overflow, assert_no_underflow])
def test_what_cannot_be_run_is_named(check):
    with pytest.raises(TypeError, match=f"^{check.__name__} expects a function, got 3; write"):
        check(3, EYE)
    with pytest.raises(TypeError, match=r"values.*, such as jnp.ones\(\(4, 4\), 'float16'\)$"):
        check(jnp.sum, jax.ShapeDtypeStruct((4, 4), np.float16))


def test_a_result_beside_a_key_is_tested():
    both = lambda x, key: jax.lax.optimization_barrier((x * 0, key))
    assert_no_underflow(both, np.ones(4, np.float16), jax.random.key(0))
    keys = lambda x: (jax.lax.scan(lambda c, _: (c, jax.random.key(0)), 0, length=0), x + 1)
    assert_no_overflow(keys, np.ones(4, np.float16), dtype="float16")


@pytest.mark.parametrize("share", [-0.1, 1, np.nan, np.inf])
def test_a_share_out_of_range_is_an_error(share):
    with pytest.raises(ValueError, match=f"share is {share}; expected a number from 0 to below 1"):
        assert_no_underflow(of_product(jnp.tanh), EYE, share=share)


def square(x):
    return x * x


def applied(x):
    return x.at[0].apply(square)


def by_batch(x):
    function = jax.custom_batching.custom_vmap(square)
    function.def_vmap(lambda _, axes, x: (square(x), axes[0]))
    return function(x)


def linear_call(x):
    double = lambda factor, x: x * factor
    return jax.custom_derivatives.linear_call(double, double, x[0], x)


def reduced(x):
    # In any order, as devices take it; a product alone would be `reduce_prod`.
    return jax.lax.reduce(x[:2], np.float16(1), lambda a, b: 2 * (a * b) / 2, (0,))


def in_windows(x):
    return jax.lax.reduce_window(x, np.float16(0), lambda a, b: a + b * b, (2,), (1,), "VALID")


def on_devices(x):
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(square, mesh=mesh, in_specs=jax.P("i"), out_specs=jax.P("i"))(x)


def in_a_ref(x):
    ref = jax.new_ref(x)
    ref[...] = square(ref[...])
    return ref[...]


def drawn(x):
    return jax.random.uniform(jax.random.key(0), (4,), jnp.float16, -200 * x[0], 200 * x[0])


def kernel(x):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    body = lambda x, out: out.__setitem__(..., x[...] * x[...])
    return pallas.pallas_call(body, out_shape=shape, interpret=True)(x)


def callback(x):
    return jax.pure_callback(np.square, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def exported(x):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.export.export(jax.jit(square))(shape).call(x)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize(
    "fn, found",
    [
        (applied, "9e+04 (1 of 4 values overflow) in scatter in float16"),
        (by_batch, "9e+04 (4 of 4 values overflow) in mul in float16 (custom_vmap_call; "),
        (jax.lax.composite(square, "my.square"), "in mul in float16 (composite:my.square; "),
        (linear_call, "in mul in float16 (linear_call; "),
        (reduced, "9e+04 (1 of 1 values overflow) in reduce in float16"),
        (in_windows, "1.8e+05 (3 of 3 values overflow) in reduce_window in float16"),
        (on_devices, "9e+04 (4 of 4 values overflow) in shard_map in float16"),
        (in_a_ref, "9e+04 (4 of 4 values overflow) in mul in float16 ("),
        (drawn, "1.2e+05 (1 of 1 values overflow) in sub in float16 (jit:_uniform; "),
        (lambda x: jax.pmap(square)(x[None]), "9e+04 (4 of 4 values overflow) in shard_map in"),
        (kernel, "4 of 4 values infinite or NaN, from finite operands, in pallas_call in float16"),
        (callback, "4 of 4 values infinite or NaN, from finite operands, in pure_callback in"),
        (exported, "4 of 4 values infinite or NaN, from finite operands, in call_exported in"),
    ],
)
def test_overflow_inside_constructs_is_found(fn, found):
    x = np.full(4, 300, np.float16)
    assert not np.isfinite(np.asarray(fn(jnp.asarray(x)), np.float32)).all()
    assert found in overflow(fn, x)
    assert_no_overflow(fn, x / np.float16(3))


def test_a_sampler_that_overflows_is_found():
    draw = lambda key: jax.random.uniform(key, (4,), jnp.float16, -60_000, 60_000)
    message = overflow(draw, jax.random.key(0))
    assert "infinite or NaN, from finite operands, in jit:_uniform in float16 (" in message


def test_underflow_inside_constructs_is_found():
    tiny = np.full(4, 1e-5, np.float16)
    for fn in (applied, reduced, on_devices):
        assert "of the values to fall to zero in float16" in underflow(fn, tiny)
        assert_no_underflow(fn, tiny + 1)


def test_a_loop_under_vmap_is_entered():
    grow = lambda r: jax.lax.while_loop(lambda r: r[0] < 10, lambda r: r * 200, r)
    x = np.float16([[1, 300], [20, 1]])
    assert_no_overflow(jax.vmap(grow), x)
    message = overflow(jax.vmap(grow), x * np.float16(2))
    assert "found 1.2e+05 (1 of 4 values overflow) in mul in float16 (while/body; " in message


def test_a_cast_of_a_result_names_the_operation_before_it():
    def model(x):
        return jnp.exp(x)  # in float32 under autocast; its result is cast to float16

    line = model.__code__.co_firstlineno + 1
    message = overflow(model, np.float16([12]))
    expected = "in convert_element_type in float16 of the result of exp in float32 ("
    assert f"{expected}{__file__}:{line} (" in message


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_numbers_in_the_code_above_the_limit_fail():
    x = np.ones(4, np.float16)
    for fn in (lambda x: x + 1e6, lambda x: -1e6 - x, lambda x: x * 1e6, lambda x: x / 1e6):
        assert "; found the number " in overflow(fn, x)
    for fn in (lambda x: jnp.where(x > 0, x, -1e9) * 2, lambda x: jnp.maximum(x, -jnp.inf) + 1):
        assert_no_overflow(fn, x)
