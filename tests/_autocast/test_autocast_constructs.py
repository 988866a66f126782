"""Autocast goes into every construct of JAX, in every order of transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.arrays import BF16_EPS, rounded
from helpers.constructs import CONSTRUCTS, NOT_FORWARD, NOT_REVERSE, ORDERS
from helpers.programs import equations
from jax import lax
from jax.experimental import pallas

import jmp_train as jt
from jmp_train.testing import assert_contractions_in

EVERY_TIME = {"grad(autocast)", "autocast(grad)"}


def _cases():
    """Each construct in each order that JAX itself can do; the rarer pairs are slow tests."""
    for construct in sorted(CONSTRUCTS):
        for order in sorted(ORDERS):
            if order.startswith("jvp") and construct in NOT_FORWARD:
                continue
            if "grad" in order and construct in NOT_REVERSE:
                continue
            quick = order in EVERY_TIME or construct == "scan"
            marks = () if quick else (pytest.mark.slow,)
            yield pytest.param(construct, order, marks=marks)


@pytest.mark.slow
@pytest.mark.parametrize("construct,order", list(_cases()))
def test_every_construct_in_every_order(construct, order):
    f, (ours, plain) = CONSTRUCTS[construct], ORDERS[order]
    w, x = jnp.asarray(rounded((6, 6), low=-0.5, high=0.5)), jnp.asarray(rounded((3, 6), seed=1))
    args = (jnp.stack([w, w / 2]), jnp.stack([x, x / 2])) if "vmap" in order else (w, x)
    got, want = ours(f)(*args), plain(f)(*args)
    assert got.dtype == want.dtype
    # A few roundings to bfloat16 along the chain, of terms of order one (some sums cancel).
    np.testing.assert_allclose(got, want, atol=12 * BF16_EPS * max(1.0, float(jnp.abs(want).max())))
    assert_contractions_in(ours(f), *args)


@pytest.mark.parametrize("construct", ["jit", "scan", "remat", "custom_vjp", "implicit"])
def test_float16_agrees_more_closely(construct):
    f = CONSTRUCTS[construct]
    w, x = jnp.asarray(rounded((6, 6), low=-0.5, high=0.5)), jnp.asarray(rounded((3, 6), seed=1))
    got, want = jax.grad(jt.autocast(f, "float16"))(w, x), jax.grad(f)(w, x)
    np.testing.assert_allclose(got, want, atol=12 * 2.0**-11 * float(jnp.abs(want).max()))


def test_branches_of_other_platforms_are_not_lowered():
    def on_a_tpu(w, x):
        kernel = lambda x, out: out.__setitem__(..., 2 * x[...])
        return pallas.pallas_call(kernel, out_shape=x)(x)

    product = lambda w, x: x @ w
    f = lambda w, x: lax.platform_dependent(w, x, tpu=on_a_tpu, default=product)
    w, x = jnp.asarray(rounded((6, 6))), jnp.asarray(rounded((3, 6), seed=1))
    want = np.float64(x) @ np.float64(w)
    got = jax.jit(jt.autocast(f))(w, x)
    np.testing.assert_allclose(got, want, atol=2 * BF16_EPS * np.abs(want).max())


def test_loop_carries_keep_their_dtypes():
    w, x = jnp.ones((4, 4)), jnp.ones((2, 4))
    for construct in ("scan", "while", "fori"):
        for eqn in equations(jax.make_jaxpr(jt.autocast(CONSTRUCTS[construct]))(w, x)):
            if eqn.primitive.name in ("scan", "while"):
                assert eqn.outvars[-1].aval.dtype in (np.float32, np.int32)


def test_parameters_of_constructs_are_kept():
    @functools.partial(jax.jit, donate_argnums=0)
    def step(w, x):
        policy = jax.checkpoint_policies.dots_saveable
        return lax.scan(
            jax.checkpoint(lambda c, _: (jnp.tanh(c @ w), None), policy=policy, prevent_cse=False),
            x,
            None,
            length=4,
            unroll=2,
            reverse=True,
        )[0]

    found = {}
    for eqn in equations(jax.make_jaxpr(jt.autocast(step))(jnp.ones((4, 4)), jnp.ones((2, 4)))):
        found[eqn.primitive.name] = eqn.params
    assert found["jit"]["name"] == "step"
    assert sum(found["jit"]["donated_invars"]) == 1
    assert (found["scan"]["unroll"], found["scan"]["reverse"]) == (2, True)
    assert found["remat2"]["policy"] is jax.checkpoint_policies.dots_saveable
    assert found["remat2"]["prevent_cse"] is False


@pytest.mark.parametrize("fn", [jax.nn.gelu, lambda x: x * jax.nn.softmax(x)])
def test_what_a_checkpoint_keeps_is_not_widened(fn):
    """float32 operations of its body cast inside: kept is the float16 array, once."""

    def loss(w, x):
        return jax.checkpoint(fn)(x @ w).sum()

    low = jt.autocast(loss, "float16")
    w, x = jnp.asarray(rounded((6, 5))), jnp.asarray(rounded((3, 6), seed=1))
    kept = jax.tree.leaves(jax.vjp(lambda w: low(w, x), w)[1])
    assert [k.dtype for k in kept if k.shape == (3, 5)] == [jnp.float16]
    np.testing.assert_allclose(jax.grad(low)(w, x), jax.grad(loss)(w, x), atol=5e-2)


def test_name_scopes_and_source_lines_are_kept():
    def f(x):
        with jax.named_scope("attention"):
            return x @ x

    eqns = equations(jax.make_jaxpr(jt.autocast(f))(jnp.ones((2, 2))))
    dot = next(e for e in eqns if e.primitive.name == "dot_general")
    assert str(dot.source_info.name_stack).endswith("attention")
    text = jax.jit(jt.autocast(f)).lower(jnp.ones((2, 2))).as_text(debug_info=True)
    assert __file__ in text


def test_a_function_called_twice_is_compiled_as_one():
    layer = jax.jit(lambda w, x: jnp.tanh(x @ w))
    f = jt.autocast(lambda w, x: layer(w, layer(w, layer(w, layer(w, x)))))
    w = jnp.ones((4, 4))
    bodies = {
        id(e.params["jaxpr"])
        for e in equations(jax.make_jaxpr(f)(w, w))
        if e.primitive.name == "jit"
    }
    assert len(bodies) <= 2  # the first is handed a float32 x, the others a bfloat16 one


@pytest.mark.parametrize("dtype", [np.dtypes.StringDType(), "U1", "S1", object, "M8[D]"], ids=str)
def test_numpy_arrays_that_jax_has_no_operations_on_reach_the_function(dtype):
    other = np.array(["2020-01-01"], dtype)

    def f(batch):
        assert batch["other"] is other
        return batch["x"] @ batch["x"]

    x = jnp.eye(2)
    np.testing.assert_array_equal(jt.autocast(f)({"x": x, "other": other}), x)
