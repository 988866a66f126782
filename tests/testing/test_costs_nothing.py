"""A program costs what its reference does, or its figures are shown."""

import functools
import types

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.models import Dropped
from jax import lax

from jmp_train.testing import assert_costs_nothing

X = jnp.ones((4, 4))
SHAPE = jax.ShapeDtypeStruct(X.shape, X.dtype)


def product(x):
    return jnp.tanh(x @ x)


def test_a_program_costs_what_it_costs():
    assert_costs_nothing(product, jax.jit(lambda x: lax.tanh(jnp.dot(x, x))), X)
    compiled = jax.jit(product).lower(X).compile()
    assert_costs_nothing(compiled, product, SHAPE)


@pytest.mark.parametrize(
    "more",
    [
        lambda x: jnp.tanh(x @ x @ x),
        lambda x: lax.scan(lambda c, _: (c @ x, None), jnp.tanh(x @ x), None, length=3)[0],
        lambda x: (
            product(x) + jax.grad(lambda x: jnp.sum(lax.cond(x.sum() > 0, product, jnp.sin, x)))(x)
        ),
    ],
    ids=["product", "scan", "cond_and_gradient"],
)
def test_more_work_is_shown_in_both_figures(more):
    with pytest.raises(AssertionError, match="the cost of the reference") as caught:
        assert_costs_nothing(more, product, X)
    ours, theirs = (jax.jit(f).lower(X).compile().cost_analysis()["flops"] for f in (more, product))
    assert f"FLOPs: {ours:,.0f}, reference {theirs:,.0f} ({ours / theirs - 1:+.2%})" in str(
        caught.value
    )


@pytest.mark.parametrize("jit", [jax.jit, nnx.jit, equinox.filter_jit])
def test_programs_of_every_jit_are_compared(jit):
    lowered = jit(product).lower(X)
    assert_costs_nothing(lowered, lowered.compile())
    assert_costs_nothing(jit(product), lowered.compile(), X)
    with pytest.raises(AssertionError, match="FLOPs"):
        assert_costs_nothing(jit(lambda x: product(x) @ x), lowered, X)


def test_a_cheaper_program_passes_and_a_dearer_one_does_not():
    assert_costs_nothing(product, lambda x: product(x) @ x, X)
    with pytest.raises(AssertionError, match="figures that are larger"):
        assert_costs_nothing(lambda x: product(x) @ x, product, X)


def test_a_count_that_xla_leaves_out_is_zero():
    reverse = lambda x: x[::-1]
    assert "flops" not in jax.jit(reverse).lower(X).compile().cost_analysis()
    with pytest.raises(AssertionError, match="FLOPs: 32, reference 0\n"):
        assert_costs_nothing(lambda x: (x + 1)[::-1] * x, reverse, X)
    assert_costs_nothing(reverse, lambda x: (x + 1)[::-1] * x, X)


def test_transcendental_functions_are_counted():
    with pytest.raises(AssertionError, match="transcendental functions: 16, reference 0") as caught:
        assert_costs_nothing(lambda x: jnp.tanh(x) * x, lambda x: x * x, X)
    assert "(as expected) FLOPs: 16, reference 16" in str(caught.value)


@pytest.mark.parametrize("wrap", [lambda f: f, equinox.filter_jit])
def test_leaves_of_a_module_that_are_not_arrays_are_static(wrap):
    module = Dropped(X, jnp.tanh, True)
    fn = wrap(lambda module, x: module(x))
    assert_costs_nothing(fn, fn, module, X)
    with pytest.raises(AssertionError, match="FLOPs"):
        assert_costs_nothing(fn, wrap(lambda module, x: x), module, X)
    shapes = jax.eval_shape(lambda: X)
    assert_costs_nothing(fn, fn, Dropped(shapes, jnp.tanh, True), shapes)


def test_something_else_than_a_function_is_refused():
    with pytest.raises(TypeError, match="expected a function or a compiled program, got int"):
        assert_costs_nothing(3, 3)


class Measured(jax.stages.Compiled):
    """A compiled program of which XLA tells the temporary memory, and counts or none."""

    def __init__(self, temporary, counts=None):
        self._temporary = temporary
        self._counts = counts

    def cost_analysis(self):
        return self._counts

    def memory_analysis(self):
        return types.SimpleNamespace(temp_size_in_bytes=self._temporary)


def test_an_unknown_figure_is_not_called_expected():
    with pytest.raises(AssertionError, match="bytes of temporary memory: 8, reference 4") as caught:
        assert_costs_nothing(Measured(8), Measured(4))
    assert "(unknown) FLOPs: unknown, reference unknown" in str(caught.value)
    assert "as expected" not in str(caught.value)


def test_a_negative_count_of_xla_is_unknown():
    assert_costs_nothing(lambda x: x, lambda x: jax.pure_callback(np.sin, SHAPE, x), X)
    called = Measured(8, {"flops": -1.0, "bytes accessed": -1.0})
    assert_costs_nothing(Measured(8, {}), called)
    assert_costs_nothing(called, Measured(8, {"transcendentals": 1.0}))
    with pytest.raises(AssertionError, match="1 of 4 figures that are larger") as caught:
        assert_costs_nothing(Measured(9, {"flops": 100.0}), called)
    assert "(unknown) FLOPs: 100, reference unknown" in str(caught.value)


@pytest.mark.parametrize("rtol", [-1, float("nan"), float("inf")])
def test_a_tolerance_that_is_no_bound_is_refused(rtol):
    with pytest.raises(ValueError, match="expected 0 or more, and finite"):
        assert_costs_nothing(product, product, X, rtol=rtol)


def test_a_difference_within_the_tolerance_passes():
    more = functools.partial(jnp.add, 1.0)
    larger, smaller = jnp.ones(101), jnp.ones(100)
    programs = [jax.jit(more).lower(x).compile() for x in (larger, smaller)]
    assert_costs_nothing(*programs, rtol=0.02)
    with pytest.raises(AssertionError, match=r"rtol=0.005"):
        assert_costs_nothing(*programs, rtol=0.005)
    with pytest.raises(ValueError, match="rtol is -1; expected 0 or more"):
        assert_costs_nothing(*programs, rtol=-1)
