"""Regions have a dtype of their own, under every transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.arrays import rounded
from helpers.constructs import doubled
from helpers.programs import equations, operand_dtypes
from jax import lax

import jmp_train as jt
from jmp_train.testing import assert_contractions_in


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: f,
        jax.jit,
        lambda f: jax.grad(lambda x: f(x).sum()),
        lambda f: jax.vmap(f),
        jax.checkpoint,
        lambda f: lambda x: lax.map(f, x),
        lambda f: lambda x: jax.jit(jax.vmap(jax.grad(lambda x: f(x).sum())))(x),
    ],
    ids=["plain", "jit", "grad", "vmap", "remat", "scan", "jit_vmap_grad"],
)
def test_a_region_is_left_alone_under_every_transformation(transform):
    @jt.with_precision("float32")
    def region(x):
        return jnp.tanh(doubled(x, x) @ jax.jit(lambda x: x @ x)(x))

    x = jnp.asarray(rounded((3, 3, 3)))
    for f in (jt.autocast(transform(region)), transform(jt.autocast(region))):
        assert_contractions_in(f, x, dtype="float32")
    np.testing.assert_array_equal(jax.jit(jt.autocast(region))(x[0]), jax.jit(region)(x[0]))


def test_a_region_is_a_context_manager_and_can_be_in_half():
    def f(x):
        with jt.with_precision("bfloat16"):
            y = jnp.exp(x)
        with jt.with_precision("float16"), jt.with_precision("float32"):
            return x @ x, y

    x = jnp.ones((2, 2))
    assert operand_dtypes(jt.autocast(f), "exp", x) == [{"bfloat16"}]
    assert_contractions_in(jt.autocast(f), x, dtype="float32")


def test_a_region_does_nothing_without_autocast():
    x = jnp.asarray(rounded((3, 3)))
    np.testing.assert_array_equal(jt.with_precision("float32")(jnp.matmul)(x, x), jnp.matmul(x, x))


def test_of_nested_autocasts_the_inner_one_decides():
    x = jnp.ones((2, 2))
    inner = jt.autocast(lambda x: jnp.tanh(x @ x), "float16")
    f = jt.autocast(lambda x: inner(x) @ x)
    dots = [e for e in equations(jax.make_jaxpr(f)(x)) if e.primitive.name == "dot_general"]
    assert [e.invars[0].aval.dtype.name for e in dots] == ["float16", "bfloat16"]
    off = jt.autocast(lambda x: jt.autocast(lambda x: x @ x, "float32")(x))
    assert_contractions_in(off, x, dtype="float32")
