"""Derivative rules of the user's run under autocast."""

import collections
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.arrays import rounded
from helpers.constructs import doubled, tripled
from helpers.programs import operand_dtypes

import jmp_train as jt
from jmp_train._jaxpr import compat


def test_custom_derivative_rules_are_the_ones_used():
    w, x = jnp.asarray(rounded((6, 6), low=-0.5, high=0.5)), jnp.asarray(rounded((3, 6), seed=1))
    for fn, times, plain in ((tripled, 3, jnp.sin), (doubled, 2, jnp.tanh)):
        got = jax.grad(jt.autocast(lambda w, fn=fn: fn(w, x).sum()))(w)
        true = jax.grad(lambda w, plain=plain: plain(x @ w).sum())(w)
        np.testing.assert_allclose(got, times * true, atol=0.1)


def test_custom_rules_with_symbolic_zeros():
    @jax.custom_jvp
    def f(a, b):
        return a @ b

    def rule(primals, tangents):
        (a, b), (da, db) = primals, tangents
        assert isinstance(db, jax.custom_derivatives.SymbolicZero)
        return f(a, b), da @ b

    f.defjvp(rule, symbolic_zeros=True)

    @jax.custom_vjp
    def g(a, b):
        return a @ b

    def forward(a, b):
        assert a.perturbed and not b.perturbed
        return a.value @ b.value, b.value

    g.defvjp(forward, lambda b, ct: (ct @ b.T, None), symbolic_zeros=True)
    a = jnp.ones((2, 2))
    for fn in (f, g):
        loss = jt.autocast(lambda a, fn=fn: fn(a, jnp.ones((2, 2))).sum())
        np.testing.assert_array_equal(jax.grad(loss)(a), 2.0)


@pytest.mark.skipif(
    not hasattr(jax.custom_vjp, "defvjp_with_logs"), reason="backward rules log from jax 0.11 on"
)
def test_what_a_backward_rule_logs_comes_through_in_its_dtype():
    @jax.custom_vjp
    def f(w, x):
        return x @ w

    def backward(residuals, ct):
        w, x = residuals
        return (x.T @ ct, ct @ w.T), {"size": jnp.abs(ct).sum(), "ct": ct}

    f.defvjp_with_logs(lambda w, x: (x @ w, (w, x)), backward)
    w, x = jnp.full((2, 2), 0.5), jnp.ones((3, 2))
    back: Any = jax.vjp(jt.autocast(f), w, x)[1]
    (dw, dx), logs = back.with_logs(jnp.ones((3, 2)))
    np.testing.assert_array_equal(dw, 3.0)
    np.testing.assert_array_equal(dx, 1.0)
    assert float(logs["size"]) == 6.0
    assert {k: v.dtype.name for k, v in logs.items()} == {"size": "float32", "ct": "float32"}


@pytest.mark.parametrize("rule", [compat.jvp_rule, compat.vjp_rule])
def test_a_layout_that_is_not_known_is_an_error_with_the_version_and_what_to_do(rule):
    with pytest.raises(compat.JaxLayoutError, match=f"in jax {jax.__version__}; .*with_prec"):
        rule({}, [True])


def test_relu_keeps_half_and_its_derivative_at_zero():
    w = jnp.eye(2)
    f = jt.autocast(lambda x: jax.nn.relu(x @ w))
    assert operand_dtypes(f, "max", jnp.ones((2, 2))) == [{"bfloat16"}]
    np.testing.assert_array_equal(jax.grad(lambda x: f(x).sum())(jnp.zeros((2, 2))), 0.0)


def test_residuals_of_a_custom_rule_are_kept_in_half():
    w, x = jnp.ones((8, 8)), jnp.ones((4, 8))
    f = jt.autocast(lambda w: doubled(w, doubled(w, x)).sum())
    kept = jax.tree.leaves(jax.eval_shape(lambda w: jax.vjp(f, w)[1], w))
    assert collections.Counter(r.dtype.name for r in kept if r.shape == (4, 8))["bfloat16"] >= 2
