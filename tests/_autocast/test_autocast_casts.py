"""Casts are not repeated; kernels, callbacks and devices see what they were written for."""

import os
import pathlib
import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.arrays import rounded
from helpers.constructs import CONSTRUCTS, scan_loop
from helpers.programs import casts
from jax import lax
from jax.experimental import io_callback

import jmp_train as jt


def test_a_weight_is_cast_once_outside_a_scan():
    w, x = jnp.ones((8, 8)), jnp.ones((4, 8))
    for f in (
        jt.autocast(scan_loop),
        jax.grad(jt.autocast(scan_loop)),
        jt.autocast(jax.grad(scan_loop)),
    ):
        assert casts(f, w, x, shape=(8, 8)) == 1
    nested = jt.autocast(CONSTRUCTS["nested_scan"])
    assert casts(nested, w, x, shape=(8, 8)) == 1
    loop = jt.autocast(CONSTRUCTS["fori"])
    assert casts(loop, w, x, shape=(8, 8)) == 1
    text = jax.jit(jt.autocast(scan_loop)).lower(w, x).as_text()
    converts = re.findall(r"stablehlo.convert .*tensor<8x8xf32>\) -> tensor<8x8xbf16>", text)
    assert len(converts) == 1


def test_the_gradient_of_a_scans_weight_is_summed_in_float32():
    # Each of 1024 steps adds 1 to the gradient; a bfloat16 sum would stop at 256.
    def f(w):
        return lax.scan(lambda c, _: (c, (jnp.ones((1, 1)) @ w).sum()), 0.0, None, length=1024)[
            1
        ].sum()

    np.testing.assert_array_equal(jax.grad(jt.autocast(f))(jnp.ones((1, 1))), 1024.0)


def test_one_array_is_cast_once_in_a_scope():
    x, w = jnp.ones((4, 8)), jnp.ones((8, 8))
    f = jt.autocast(lambda x, w: (x @ w) + (jnp.sin(x) * 0 + x) @ w.T @ w)
    assert casts(f, x, w, shape=(8, 8)) <= 2  # w, and w.T, which is another array
    layer = jax.jit(lambda w, x: jnp.tanh(x @ w))
    chained = jt.autocast(lambda x, w: layer(w, layer(w, layer(w, x))))
    assert casts(chained, x, w, shape=(8, 8)) == 1


def test_back_to_back_casts_vanish():
    def f(x):
        y = (x @ x).astype(jnp.bfloat16).astype(jnp.float32)  # exact: nothing is left of it
        return y.reshape(-1).reshape(x.shape).T @ y

    x = jnp.ones((4, 4))
    assert casts(jt.autocast(f), x) == 1  # x itself
    assert casts(jt.autocast(f), x, dtype="float32") == 1  # the output


def test_autocast_adds_no_products():
    w, x = jnp.ones((8, 8)), jnp.ones((4, 8))
    for construct in ("scan", "remat", "custom_vjp", "jit"):
        count = lambda f: jax.jit(f).lower(w, x).as_text().count("stablehlo.dot_general")
        grad = jax.grad(CONSTRUCTS[construct])
        assert count(jax.grad(jt.autocast(CONSTRUCTS[construct]))) == count(grad)


# What is not entered.


def test_callbacks_and_kernels_see_the_dtypes_they_were_written_for():
    from jax.experimental import pallas as pl

    seen = []

    def record(a):
        seen.append(a.dtype.name)
        return np.asarray(a)

    def kernel(x_ref, o_ref):
        o_ref[...] = x_ref[...] * 2.0

    def f(x):
        h = x @ x
        jax.debug.callback(lambda a: seen.append(a.dtype.name), h)
        h = jax.pure_callback(record, jax.ShapeDtypeStruct(h.shape, h.dtype), h)
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        doubled = pl.pallas_call(kernel, out_shape=shape, interpret=True)(x @ x)
        return h, doubled, jnp.linalg.cholesky(x @ x + 3 * jnp.eye(2))

    x = jnp.ones((2, 2))
    h, doubled, factor = jax.jit(jt.autocast(f))(x)
    jax.effects_barrier()
    assert seen == ["float32", "float32"]
    np.testing.assert_array_equal(h, 2.0)
    np.testing.assert_array_equal(doubled, 4.0)
    np.testing.assert_allclose(factor @ factor.T, np.full((2, 2), 2.0) + 3 * np.eye(2), rtol=1e-5)


def test_ordered_effects_keep_their_order_inside_loops():
    seen = []

    def f(x):
        def body(i, c):
            io_callback(lambda i: seen.append(int(i)), None, i, ordered=True)
            return jnp.tanh(c @ c)

        return lax.fori_loop(0, 4, body, x)

    jax.jit(jt.autocast(f))(jnp.eye(2))
    jax.effects_barrier()
    assert seen == [0, 1, 2, 3]


def test_bits_of_a_number_are_those_of_its_dtype():
    x = jnp.asarray(rounded((2, 2)))
    f = jt.autocast(lambda x: lax.bitcast_convert_type(x @ jnp.eye(2), jnp.int32))
    np.testing.assert_array_equal(f(x), np.asarray(x).view(np.int32))


def test_random_numbers_are_the_same():
    f = lambda key: jax.random.normal(key, (4,)) + jax.random.uniform(key, (4,))
    np.testing.assert_array_equal(jt.autocast(f)(jax.random.key(0)), f(jax.random.key(0)))


def test_mutable_references_inside_keep_their_dtype():
    def f(x):
        ref = jax.new_ref(jnp.zeros((2, 2)))
        ref[...] = x @ x
        return ref[...] @ x

    np.testing.assert_array_equal(jt.autocast(f)(jnp.ones((2, 2))), 4.0)


@pytest.mark.slow
def test_shard_map_on_four_devices():
    program = """
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import AxisType, PartitionSpec as P
        import jmp_train as jt
        from jmp_train.testing import assert_contractions_in
        mesh = jax.make_mesh((4,), ("i",), axis_types=(AxisType.Auto,))
        def f(w, x):
            def body(c, _):
                return jnp.tanh(c @ w), jax.lax.psum(jnp.sum(c), "i")
            c, sums = jax.lax.scan(body, x, None, length=3)
            return c, sums
        sharded = jax.shard_map(f, mesh=mesh, in_specs=(P(), P("i")), out_specs=(P("i"), P()))
        loss = lambda w, x: sum(o.sum() for o in sharded(w, x))
        w = jax.random.normal(jax.random.key(0), (6, 6)) * 0.3
        x = jax.random.normal(jax.random.key(1), (8, 6))
        want = jax.grad(loss)(w, x)
        for g in (jax.grad(jt.autocast(loss)), jt.autocast(jax.grad(loss))):
            assert_contractions_in(g, w, x)
            got = jax.jit(g)(w, x)
            np.testing.assert_allclose(got, want, atol=0.03 * float(jnp.abs(want).max()))
        def local(w, x):  # autocast inside shard_map
            return jt.autocast(lambda w, x: jax.lax.psum(jnp.sum(x @ w), "i"))(w, x)
        inner = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("i")), out_specs=P())
        np.testing.assert_allclose(inner(w, x), (x @ w).sum(), rtol=0.05, atol=0.1)
        assert_contractions_in(inner, w, x)
        print("done", len(jax.devices()))
    """
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    tests = str(pathlib.Path(__file__).parents[1])
    env["PYTHONPATH"] = os.pathsep.join([os.getcwd(), tests, env.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "done 4" in done.stdout, done.stderr[-2000:]
