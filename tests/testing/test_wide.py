"""Programs evaluated in float64, against the same formulas in NumPy's float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas

from jmp_train._autocast.traced import TracedFunction
from jmp_train.testing.wide import results_in_float64
from jmp_train.testing.worst import observe
from tests.helpers.arrays import through

X = np.random.default_rng(0).normal(size=(6, 6)).astype(np.float32)
XW = X.astype(np.float64)
TENTH = np.float64(np.float32(0.1))


def wide(fn, *args):
    return results_in_float64(TracedFunction(fn, args, {}))


@jax.custom_jvp
def square(x):
    return (x * x).astype(jnp.float16).astype(x.dtype)


square.defjvp(lambda p, t: (square(p[0]), (3 * p[0] * t[0]).astype(jnp.float16).astype(t[0].dtype)))


@jax.custom_vjp
def straight_through(x):
    return jnp.round(x * 4) / 4


straight_through.defvjp(
    lambda x: (straight_through(x), x.astype(jnp.bfloat16)),
    lambda x, g: (g * x.astype(jnp.float32) / 3,),
)


def cumulative(x):
    return jax.lax.scan(lambda c, v: (c + v, (c * v).astype(jnp.bfloat16)), jnp.float32(0), x[0])


def newton(x):
    """Return the square root of the mean square by 40 steps."""
    target = jnp.mean(jnp.square(x))
    step = lambda c: (c[0] + 1, 0.5 * (c[1] + target / c[1]))
    return jax.lax.while_loop(lambda c: c[0] < 40, step, (0, target))[1]


def in_bfloat16(x):
    return jax.lax.dot_general(
        x.astype(jnp.bfloat16), x.astype(jnp.bfloat16), (((1,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )  # fmt: skip


def convolution(x):
    out = jax.lax.conv_general_dilated(
        x[None, None], x[None, None, :2, :2], (1, 1), "VALID", precision="highest"
    )
    return out[0, 0]


def windows(x):
    return sum(x[i : i + 5, j : j + 5] * x[i, j] for i in range(2) for j in range(2))


def narrow_third(x):
    return x.astype(jnp.bfloat16).astype(jnp.float32) / 3


batched = jax.custom_batching.custom_vmap(narrow_third)
batched.def_vmap(lambda _, axes, x: (narrow_third(x), axes[0]))


def linear(x):
    third = lambda factor, x: narrow_third(x) * factor
    return jax.custom_derivatives.linear_call(third, third, np.float32(2), x)


def solved(x):
    third = lambda _, x: narrow_third(x)
    return jax.lax.custom_linear_solve(lambda v: 3 * v, x, third, symmetric=True)


def on_devices(function, **options):
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    options = {"in_specs": jax.P("i"), "out_specs": jax.P("i"), **options}
    return jax.shard_map(function, mesh=mesh, **options)


def summed_on_devices(x):
    return on_devices(lambda x: jax.lax.psum(narrow_third(x), "i"), out_specs=jax.P())(x)


def reduced(x):
    combine = lambda a, b: a + narrow_third(b)
    return jax.lax.reduce(x, np.float32(0), combine, (0,))


def reduced_in_windows(x):
    combine = lambda a, b: a + narrow_third(b)
    return jax.lax.reduce_window(x, np.float32(0), combine, (2, 2), (1, 1), "VALID")


def doubled_to_8(x):
    """Double each row until its first element is 8 or more, under vmap."""
    double = lambda r: (r * 2).astype(jnp.bfloat16).astype(jnp.float32)
    return jax.vmap(lambda r: jax.lax.while_loop(lambda r: r[0] < 8, double, r))(jnp.abs(x) + 0.01)


def summed_in_a_ref(x):
    total = jax.new_ref(jnp.zeros(6))

    def body(count, row):
        total[...] += narrow_third(row)
        return count + 1, total[...]

    _, totals = jax.lax.scan(body, 0, x)
    return totals + total[...]


def on_a_tpu(x):
    """Double in a kernel that lowers on a TPU alone."""
    return pallas.pallas_call(lambda x, out: out.__setitem__(..., 2 * x[...]), out_shape=x)(x)


def rows_doubled_to_8():
    x = np.abs(XW) + np.float64(np.float32(0.01))
    return np.stack([r * 2 ** max(0, np.ceil(np.log2(8 / r[0]))) for r in x])


PROGRAMS = {
    "composite": (jax.lax.composite(narrow_third, "a.b"), XW / 3),
    "custom_vmap": (batched, XW / 3),
    "linear_call": (linear, XW * 2 / 3),
    "custom_linear_solve": (solved, XW / 3),
    "shard_map": (on_devices(narrow_third), XW / 3),
    "psum in shard_map": (summed_on_devices, XW / 3),
    "pmap": (lambda x: jax.pmap(narrow_third)(x[None])[0], XW / 3),
    "reduce": (reduced, XW.sum(0) / 3),
    "reduce_window": (reduced_in_windows,
                      sum(XW[i : i + 5, j : j + 5] for i in range(2) for j in range(2)) / 3),
    "platform_dependent": (
        lambda x: jax.lax.platform_dependent(x, tpu=on_a_tpu, default=narrow_third), XW / 3),
    "named platforms": (
        lambda x: jax.lax.platform_dependent(x, tpu=on_a_tpu, cpu=narrow_third, cuda=narrow_third),
        XW / 3),
    "new_ref": (summed_in_a_ref, (np.cumsum(XW, 0) + XW.sum(0)) / 3),
    "while under vmap": (doubled_to_8, rows_doubled_to_8()),
    "cast": (lambda x: x.astype(jnp.float16).astype(jnp.float32) / 3, XW / 3),
    "preferred_element_type": (in_bfloat16, XW @ XW),
    "precision": (lambda x: jnp.dot(x, x, precision="BF16_BF16_F32"), XW @ XW),
    "constants": (lambda x: x + jnp.full(6, 0.1, jnp.float32) * 0.1, XW + TENTH**2),
    "reduce_precision": (lambda x: jax.lax.reduce_precision(x, 5, 2) / 3, XW / 3),
    "sum": (lambda x: jnp.sum(x.astype(jnp.bfloat16), 0, dtype=jnp.bfloat16), XW.sum(0)),
    "softmax": (
        lambda x: jax.nn.softmax(x.astype(jnp.float16)),
        np.exp(XW) / np.exp(XW).sum(-1, keepdims=True),
    ),
    "jit": (lambda x: jax.jit(lambda y: y.astype(jnp.bfloat16) / 3)(x), XW / 3),
    "remat": (lambda x: jax.checkpoint(lambda y: jnp.exp(jnp.sin(y)))(x), np.exp(np.sin(XW))),
    "cond": (lambda x: jax.lax.cond(x[0, 0] > 5, jnp.sin, jnp.cos, x), np.cos(XW)),
    "switch": (lambda x: jax.lax.switch(2, [jnp.sin, jnp.cos, jnp.exp], x), np.exp(XW)),
    "while": (newton, np.sqrt(np.mean(XW**2))),
    "custom_jvp": (square, XW**2),
    "custom_vjp": (lambda x: straight_through(x) / 3, np.round(XW * 4) / 12),
    "rule of custom_jvp": (jax.grad(lambda x: square(x).sum()), 3 * XW),
    "rule of custom_vjp": (jax.grad(lambda x: straight_through(x).sum()), XW / 3),
    "scatter-add": (lambda x: (x / 3).at[jnp.array([1, 1, 3])].add(x[:3] / 7),
                    XW / 3 + sum(np.eye(6)[:, [i]] * XW[j] / 7 for j, i in enumerate((1, 1, 3)))),
    "scatter-mul": (lambda x: (x / 3).at[1].multiply(x[2]),
                    np.where(np.arange(6)[:, None] == 1, XW / 3 * XW[2], XW / 3)),
    "scatter": (lambda x: (x / 3).at[1].set(x[2] / 7),
                np.where(np.arange(6)[:, None] == 1, XW[2] / 7, XW / 3)),
    "gradient of gather": (jax.grad(lambda x: jnp.sum(x[jnp.array([2, 2])] ** 3) / 3),
                           np.where(np.arange(6)[:, None] == 2, 2 * XW**2, 0)),
    "gather and sort": (lambda x: jnp.sort(x[jnp.array([2, 0])] / 3), np.sort(XW[[2, 0]] / 3)),
    "cumsum": (lambda x: jnp.cumsum(x / 3, 1), np.cumsum(XW / 3, 1)),
    "convolution": (convolution, windows(XW)),
    "inverse": (lambda x: jnp.linalg.inv(x + 9 * jnp.eye(6)), np.linalg.inv(XW + 9 * np.eye(6))),
    "fft": (lambda x: jnp.fft.fft(x), np.fft.fft(XW)),
    "vmap": (jax.vmap(lambda r: jnp.logaddexp(r, 0.0)), np.logaddexp(XW, 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_result_is_that_of_numpy_in_float64(name):
    fn, expected = PROGRAMS[name]
    got = wide(fn, X)
    assert got.dtype == (np.complex128 if name == "fft" else np.float64)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-13)


def test_scan_carries_and_stacks_in_float64():
    total, products = wide(cumulative, X)
    before = np.cumsum(XW[0]) - XW[0]
    np.testing.assert_allclose(total, XW[0].sum(), rtol=1e-13)
    np.testing.assert_allclose(products, before * XW[0], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("reverse", [False, True])
def test_step_by_step_is_the_program(reverse):
    def program(x):
        def body(carry, row):
            carry = jax.lax.cond(row[0] > 0, jnp.sin, jnp.cos, carry + row)
            return carry, (carry * 2, row.astype(jnp.bfloat16))

        out = jax.lax.scan(body, jnp.zeros(6), x, reverse=reverse)
        nothing = jax.lax.scan(body, jnp.zeros(6), x[:0], reverse=reverse)
        return out, newton(x), nothing

    traced = TracedFunction(program, (X,), {})
    stepwise = traced.rebuild(observe(traced, lambda *_: None))
    expected = jax.jit(program)(X)
    for a, b in zip(jax.tree.leaves(stepwise), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=1e-6, atol=1e-6)


def test_random_numbers_integers_and_keys_are_those_of_the_program():
    def program(key, n):
        mask = jax.random.bernoulli(key, 0.5, (50,))
        return mask, jax.random.uniform(key, (5,)), n + 1, jax.random.split(key)

    key, n = jax.random.key(3), jnp.arange(3, dtype=jnp.int32)
    expected = program(key, n)
    mask, uniform, plus, keys = wide(program, key, n)
    np.testing.assert_array_equal(mask, expected[0])
    np.testing.assert_array_equal(uniform, np.float64(expected[1]))
    assert plus.dtype == np.int32
    np.testing.assert_array_equal(plus, [1, 2, 3])
    np.testing.assert_array_equal(jax.random.key_data(keys), jax.random.key_data(expected[3]))


@pytest.mark.parametrize("sampler", [jax.random.normal, jax.random.uniform, jax.random.gumbel])
def test_what_a_sampler_draws_stays_in_its_dtype(sampler):
    draw = lambda key: sampler(key, (200,), jnp.bfloat16)
    key = jax.random.key(3)
    np.testing.assert_allclose(wide(draw, key), np.float64(draw(key)), rtol=2.0**-8)


def test_a_sampler_of_arrays_moves_them_in_float64():
    key = jax.random.key(3)
    order = jax.random.permutation(key, 6)
    got = wide(lambda x: jax.random.permutation(key, narrow_third(x)), X)
    np.testing.assert_allclose(got, XW[order] / 3, rtol=1e-15)


def test_a_sampler_of_computed_numbers_calculates_with_them_in_float64():
    key, high = jax.random.key(3), jnp.float16(300)
    draw = lambda high: jax.random.uniform(key, (8,), jnp.float16, maxval=high * high)
    unit = wide(lambda: jax.random.uniform(key, (8,), jnp.float16))
    np.testing.assert_allclose(wide(draw, high), unit * 90_000, rtol=1e-15)  # inf in float16
    slope = wide(jax.grad(lambda high: draw(high).astype(jnp.float32).sum()), high)
    np.testing.assert_allclose(slope, unit.sum() * 600, rtol=1e-15)


def test_a_jitted_function_takes_a_token():
    def fn(x):
        token = jax.lax.create_token(x)
        return jax.jit(lambda token, x: (token, jnp.sin(x)))(token, x)[1]

    np.testing.assert_allclose(wide(fn, X), np.sin(XW), rtol=1e-15)


def test_a_callback_receives_what_it_was_written_for():
    def root(x):
        assert x.dtype == np.float32
        return np.sqrt(x)

    call = functools.partial(jax.pure_callback, root, jax.ShapeDtypeStruct((2,), jnp.float32))
    got = wide(lambda x: call(x) / 3, np.array([4, 9], np.float32))
    np.testing.assert_allclose(got, [2 / 3, 1], rtol=1e-15)


def test_a_function_applied_to_elements_is_in_float64():
    applied = lambda x: jnp.sin(x).astype(jnp.float16).astype(jnp.float32) * 0.1
    got = wide(lambda x: x.at[0].apply(applied), X)
    np.testing.assert_allclose(got[0], np.sin(XW[0]) * TENTH, rtol=1e-14)
    np.testing.assert_array_equal(got[1:], XW[1:])


def test_an_exported_function_runs_as_it_was_written():
    third = jax.jit(through)
    exported = jax.export.export(third)(jax.ShapeDtypeStruct(X.shape, X.dtype))
    got = wide(lambda x: exported.call(x) / 3, X)
    np.testing.assert_allclose(got, np.float64(X.astype(jnp.bfloat16)) / 3, rtol=1e-15)


@pytest.mark.slow
def test_poisson_under_vmap_is_that_of_the_program():
    keys = jax.random.split(jax.random.key(0), 3)
    draw = jax.vmap(lambda key: jax.random.poisson(key, 3.0))
    np.testing.assert_array_equal(wide(draw, keys), draw(keys))
    traced = TracedFunction(draw, (keys,), {})
    np.testing.assert_array_equal(traced.rebuild(observe(traced, lambda *_: None)), draw(keys))


def test_subnormal_arguments_are_not_flushed():
    x = np.array([2.0**-149, 2.0**-133], np.float32)
    np.testing.assert_array_equal(wide(lambda x: x * 2.0, x), np.float64(x) * 2)
