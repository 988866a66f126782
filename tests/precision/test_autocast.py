"""Autocast runs every operation in the dtype its lists say, inside every construct of JAX."""

import collections
import functools
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import scipy.special
from jax import lax
from jax.experimental import io_callback
from jax.extend.core import Primitive
from jax.interpreters import mlir

import jmp_train as jt
from jmp_train._jaxpr import compat as _jax_compat

BF16_EPS = 2.0**-8  # half an ulp of bfloat16 is 2**-9 relative; operand and result are rounded
F32_EPS = 2.0**-23


def equations(jaxpr):
    """Every equation of a jaxpr, those of its bodies included."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for eqn in jaxpr.eqns:
        yield eqn
        for param in eqn.params.values():
            for item in param if isinstance(param, (tuple, list)) else [param]:
                if hasattr(item, "eqns") or hasattr(item, "jaxpr"):
                    yield from equations(item)


def ran_in(fn, primitive, *args):
    """The dtypes of the floating operands of each equation of a primitive."""
    found = []
    for eqn in equations(jax.make_jaxpr(fn)(*args)):
        if eqn.primitive.name == primitive:
            floats = [a.aval.dtype for a in eqn.invars if jnp.issubdtype(a.aval.dtype, np.floating)]
            found.append({d.name for d in floats})
    return found


def casts(fn, *args, dtype="bfloat16", shape=None):
    """How many equations convert an array (of a shape) to a dtype."""
    eqns = equations(jax.make_jaxpr(fn)(*args))
    return sum(
        e.primitive.name == "convert_element_type"
        and e.params["new_dtype"] == dtype
        and e.invars[0].aval.ndim > 0
        and (shape is None or e.invars[0].aval.shape == shape)
        for e in eqns
    )


def rounded(shape, seed=0, low=-2.0, high=2.0):
    """float32 numbers that bfloat16 holds exactly, so that a cast to half loses nothing."""
    x = np.random.default_rng(seed).uniform(low, high, shape)
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def through_product(op):
    """`op` on the result of a product with the identity: a half-precision array with x's values."""
    return lambda x, *rest: op(x @ jnp.eye(x.shape[-1]), *rest)


# The lists.


def test_every_listed_name_is_a_primitive_of_jax():
    import jax._src.interpreters.mlir as internal

    known = {p.name for p in internal._lowerings}
    known |= {p.name for table in internal._platform_specific_lowerings.values() for p in table}
    rules = jt.default_op_rules
    assert rules.compute | rules.float32 | rules.promote <= known


def test_rules_are_hashable_and_equal_by_value():
    sets = [frozenset({name}) for name in ("dot_general", "exp", "add")]
    rules = jt.OpRules(*sets)
    assert hash(rules) == hash(jt.OpRules(*map(frozenset, sets)))
    assert rules != jt.default_op_rules


@pytest.mark.parametrize(
    "change,words",
    [
        ({"float32": ["tnah"]}, "did you mean 'tanh'"),
        ({"compute": ["dot_genral"]}, "did you mean 'dot_general'"),
        ({"as_written": ["logistik"]}, "did you mean 'logistic'"),
        ({"float32": ["scan"]}, "its body is entered"),
        ({"float32": ["tanh"], "compute": ["tanh"]}, "in two rules"),
    ],
)
def test_a_wrong_rule_says_what_is_wrong(change, words):
    with pytest.raises(ValueError, match=words):
        jt.default_op_rules.extend(**change)


@pytest.mark.parametrize("rule,dtype", [("compute", "bfloat16"), ("float32", "float32")])
def test_a_primitive_moved_to_a_list_runs_by_it(rule, dtype):
    rules = jt.default_op_rules.extend(**{rule: ["tanh"]})
    x = jnp.ones((2, 2))
    f = jt.autocast(lambda x: (jnp.tanh(x @ x), jnp.tanh(x)), rules=rules)
    assert ran_in(f, "tanh", x) == [{dtype}, {dtype}]


def test_a_users_primitive_runs_as_written_until_a_rule_names_it():
    twice = Primitive("twice_for_test")
    twice.def_abstract_eval(lambda a: a)
    twice.def_impl(lambda a: a + a)
    mlir.register_lowering(twice, mlir.lower_fun(lambda a: a + a, multiple_results=False))
    f, x = through_product(twice.bind), jnp.ones((2, 2))
    assert ran_in(jt.autocast(f), "twice_for_test", x) == [{"float32"}]
    rules = jt.default_op_rules.extend(compute=[twice])
    assert ran_in(jt.autocast(f, rules=rules), "twice_for_test", x) == [{"bfloat16"}]


# Each primitive: its dtype read from the jaxpr, its value against float64.

_S = scipy.special
FLOAT32_OPS = {
    "acos": (jnp.arccos, np.arccos, -0.9, 0.9),
    "acosh": (jnp.arccosh, np.arccosh, 1.1, 3.0),
    "asin": (jnp.arcsin, np.arcsin, -0.9, 0.9),
    "asinh": (jnp.arcsinh, np.arcsinh, -2.0, 2.0),
    "atanh": (jnp.arctanh, np.arctanh, -0.9, 0.9),
    "bessel_i0e": (jax.scipy.special.i0e, _S.i0e, -2.0, 2.0),
    "bessel_i1e": (jax.scipy.special.i1e, _S.i1e, -2.0, 2.0),
    "cosh": (lax.cosh, np.cosh, -2.0, 2.0),
    "cumlogsumexp": (
        lambda x: lax.cumlogsumexp(x, axis=1),
        lambda x: np.logaddexp.accumulate(x, axis=1),
        -2.0,
        2.0,
    ),
    "cumprod": (lambda x: lax.cumprod(x, axis=1), lambda x: np.cumprod(x, axis=1), 0.5, 1.5),
    "cumsum": (lambda x: lax.cumsum(x, axis=1), lambda x: np.cumsum(x, axis=1), 0.5, 1.5),
    "digamma": (lax.digamma, _S.digamma, 2.0, 4.0),
    "erf_inv": (lax.erf_inv, _S.erfinv, -0.9, 0.9),
    "exp": (jnp.exp, np.exp, -2.0, 2.0),
    "exp2": (lax.exp2, np.exp2, -2.0, 2.0),
    "expm1": (jnp.expm1, np.expm1, -2.0, 2.0),
    "igamma": (lambda x: lax.igamma(x, x + 1), lambda x: _S.gammainc(x, x + 1), 1.0, 3.0),
    "igamma_grad_a": (lambda x: lax.igamma_grad_a(x, x + 1), None, 1.0, 3.0),
    "igammac": (lambda x: lax.igammac(x, x + 1), lambda x: _S.gammaincc(x, x + 1), 1.0, 3.0),
    "lgamma": (lax.lgamma, _S.gammaln, 3.0, 5.0),
    "log": (jnp.log, np.log, 1.5, 4.0),
    "log1p": (jnp.log1p, np.log1p, 0.5, 3.0),
    "polygamma": (lambda x: lax.polygamma(x * 0 + 1, x), lambda x: _S.polygamma(1, x), 2.0, 4.0),
    "pow": (lambda x: x**2.5, lambda x: x**2.5, 0.5, 2.0),
    "reduce_prod": (lambda x: x.prod(1), lambda x: x.prod(1), 0.5, 1.5),
    "reduce_sum": (lambda x: x.sum(1), lambda x: x.sum(1), 0.5, 1.5),
    "reduce_window_sum": (
        lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 2), (1, 2), "VALID"),
        lambda x: x.reshape(x.shape[0], -1, 2).sum(2),
        0.5,
        1.5,
    ),
    "regularized_incomplete_beta": (
        lambda x: lax.betainc(x, x + 1, x / 4),
        lambda x: _S.betainc(x, x + 1, x / 4),
        1.0,
        2.0,
    ),
    "rsqrt": (lax.rsqrt, lambda x: 1 / np.sqrt(x), 0.5, 2.0),
    "scatter-add": (
        lambda x: jnp.zeros(2).at[jnp.arange(x.size) % 2].add(x.ravel()),
        lambda x: np.array([x.ravel()[0::2].sum(), x.ravel()[1::2].sum()]),
        0.5,
        1.5,
    ),
    "scatter-mul": (
        lambda x: jnp.ones(2).at[jnp.arange(x.size) % 2].multiply(x.ravel()),
        lambda x: np.array([x.ravel()[0::2].prod(), x.ravel()[1::2].prod()]),
        0.8,
        1.2,
    ),
    "scatter-sub": (
        lambda x: jnp.zeros(2).at[jnp.arange(x.size) % 2].subtract(x.ravel()),
        lambda x: -np.array([x.ravel()[0::2].sum(), x.ravel()[1::2].sum()]),
        0.5,
        1.5,
    ),
    "select_and_gather_add": (None, None, 0.0, 0.0),  # forward mode of max pooling, below
    "select_and_scatter_add": (None, None, 0.0, 0.0),  # its gradient, below
    "sinh": (lax.sinh, np.sinh, -2.0, 2.0),
    "tan": (jnp.tan, np.tan, -1.0, 1.0),
    "zeta": (lambda x: lax.zeta(x, x), lambda x: _S.zeta(x, x), 2.0, 4.0),
}


def test_no_float32_primitive_is_left_untested():
    assert set(FLOAT32_OPS) == jt.default_op_rules.float32


@pytest.mark.parametrize("name", [n for n, case in FLOAT32_OPS.items() if case[0]])
def test_a_listed_primitive_runs_in_float32_on_a_half_operand(name):
    op, oracle, low, high = FLOAT32_OPS[name]
    x = rounded((4, 6), low=low, high=high)
    f = jt.autocast(through_product(op))
    assert set(map(frozenset, ran_in(f, name, x))) == {frozenset({"float32"})}
    if oracle is not None:
        # Special functions in float32 are good to some 100 ulp; bfloat16 would be 300 times worse.
        np.testing.assert_allclose(f(x), oracle(x.astype(np.float64)), rtol=400 * F32_EPS)


def test_the_derivatives_of_max_pooling_add_in_float32():
    pool = lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 2), (1, 1), "VALID")
    x = jnp.asarray(rounded((4, 6)))
    f = through_product(pool)
    back = jt.autocast(lambda x: jax.vjp(f, x)[1](jnp.ones((4, 5))))
    assert ran_in(back, "select_and_scatter_add", x) == [{"float32"}]
    forward = jt.autocast(lambda x: jax.jvp(f, (x,), (x,)))
    assert ran_in(forward, "select_and_gather_add", x) == [{"float32"}]


COMPUTE_OPS = {
    "dot_general": (lambda x, w: x @ w, lambda x, w: x @ w),
    "conv_general_dilated": (
        lambda x, w: lax.conv_general_dilated(x[None, None], w[None, None], (1, 1), "VALID"),
        lambda x, w: np.array([[[[(x * w).sum()]]]]),
    ),
    "ragged_dot_general": (
        lambda x, w: lax.ragged_dot(x, w[None], jnp.array([x.shape[0]])),
        lambda x, w: x @ w,
    ),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", sorted(COMPUTE_OPS))
def test_a_contraction_runs_in_the_compute_dtype_and_hands_it_on(name, dtype):
    assert set(COMPUTE_OPS) == jt.default_op_rules.compute
    op, oracle = COMPUTE_OPS[name]
    x, w = rounded((6, 6)), rounded((6, 6), seed=1)
    f = jt.autocast(op, dtype)
    eqn = next(e for e in equations(jax.make_jaxpr(f)(x, w)) if e.primitive.name == name)
    assert (
        {a.aval.dtype.name for a in eqn.invars[:2]} == {dtype} == {eqn.outvars[0].aval.dtype.name}
    )
    assert f(x, w).dtype == np.float32
    # The operands are exact in half and the sum is float32, so the result is rounded once.
    eps = float(jnp.finfo(dtype).eps)
    terms = np.abs(oracle(np.abs(x).astype(np.float64), np.abs(w).astype(np.float64)))
    assert np.all(
        np.abs(f(x, w) - oracle(x.astype(np.float64), w.astype(np.float64))) <= eps * terms
    )


PROMOTE_OPS = {
    "add": (lambda x: x + x * 3, lambda x: x + x * 3),
    "mul": (lambda x: x * x, lambda x: x * x),
    "div": (lambda x: x / (x * x + 1), lambda x: x / (x * x + 1)),
    "tanh": (jnp.tanh, np.tanh),
    "logistic": (jax.nn.sigmoid, _S.expit),
    "sqrt": (lambda x: jnp.sqrt(jnp.abs(x)), lambda x: np.sqrt(np.abs(x))),
    "cbrt": (jnp.cbrt, np.cbrt),
    "sin": (jnp.sin, np.sin),
    "cos": (jnp.cos, np.cos),
    "erf": (lax.erf, _S.erf),
    "erfc": (lax.erfc, _S.erfc),
    "atan": (jnp.arctan, np.arctan),
    "atan2": (lambda x: jnp.arctan2(x, x + 3), lambda x: np.arctan2(x, x + 3)),
    "max": (lambda x: jnp.maximum(x, 0.5), lambda x: np.maximum(x, 0.5)),
    "min": (lambda x: jnp.minimum(x, -x), lambda x: np.minimum(x, -x)),
    "rem": (lambda x: jnp.fmod(x, 0.75), lambda x: np.fmod(x, 0.75)),
    "select_n": (lambda x: jnp.where(x > 0, x, -1.0), lambda x: np.where(x > 0, x, -1.0)),
    "clamp": (lambda x: lax.clamp(-1.0, x, 1.0), lambda x: np.clip(x, -1, 1)),
    "pad": (lambda x: jnp.pad(x, 1), lambda x: np.pad(x, 1)),
    "concatenate": (lambda x: jnp.concatenate([x, -x]), lambda x: np.concatenate([x, -x])),
    "dynamic_update_slice": (
        lambda x: lax.dynamic_update_slice(jnp.zeros((5, 6)), x, (1, 0)),
        lambda x: np.concatenate([np.zeros((1, 6)), x]),
    ),
    "scatter": (lambda x: x.at[1].set(2.0), lambda x: np.r_[x[:1], np.full((1, 6), 2.0), x[2:]]),
    "scatter-max": (lambda x: x.at[1].max(0.5), lambda x: np.r_[x[:1], x[1:2].clip(0.5), x[2:]]),
    "scatter-min": (
        lambda x: x.at[1].min(0.5),
        lambda x: np.r_[x[:1], x[1:2].clip(None, 0.5), x[2:]],
    ),
    "gather": (lambda x: x[jnp.array([2, 0])], lambda x: x[[2, 0]]),
    "reduce_max": (lambda x: x.max(1), lambda x: x.max(1)),
    "cummax": (lambda x: lax.cummax(x, axis=1), lambda x: np.maximum.accumulate(x, axis=1)),
    "sort": (jnp.sort, np.sort),
    "transpose": (jnp.transpose, np.transpose),
    "rev": (lambda x: x[::-1], lambda x: x[::-1]),
    "abs": (jnp.abs, np.abs),
    "neg": (lambda x: -x, lambda x: -x),
    "sign": (jnp.sign, np.sign),
    "round": (jnp.round, np.round),
    "floor": (jnp.floor, np.floor),
    "integer_pow": (lambda x: x**3, lambda x: x**3),
    "square": (jnp.square, np.square),
}


@pytest.mark.parametrize("name", sorted(PROMOTE_OPS))
def test_other_operations_follow_their_half_operand(name):
    op, oracle = PROMOTE_OPS[name]
    x = rounded((4, 6))
    # a reader in half keeps the sums and squares from being formed in float32 for the output
    f = jt.autocast(lambda x: jnp.tanh(through_product(op)(x)))
    assert {"bfloat16"} in ran_in(f, name, x)
    want = np.tanh(oracle(x.astype(np.float64)))
    np.testing.assert_allclose(f(x), want, rtol=6 * BF16_EPS, atol=6 * BF16_EPS)


@pytest.mark.parametrize("name", sorted(PROMOTE_OPS))
def test_operations_on_float32_alone_stay_in_float32(name):
    x = jnp.asarray(rounded((4, 6)))
    assert {"float32"} in ran_in(jt.autocast(PROMOTE_OPS[name][0]), name, x)
    np.testing.assert_array_equal(jt.autocast(PROMOTE_OPS[name][0])(x), PROMOTE_OPS[name][0](x))


def test_mixed_operands_promote_to_the_widest():
    x = jnp.ones((2, 2))
    f = jt.autocast(lambda x, y: jnp.tanh((x @ x) * y))
    assert ran_in(f, "mul", x, x) == [{"float32"}]


#: What torch 2.13 runs in float32 under `torch.autocast("cuda")`, of what JAX has too; read from its
#: own test lists (`torch.testing._internal.autocast_test_lists`).
TORCH_FP32 = {
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "rsqrt",
    "sinh", "tan", "pow", "softmax", "log_softmax", "sum", "prod", "cumsum", "cumprod", "norm",
}  # fmt: skip


def test_torch_and_autocast_agree_on_what_runs_in_float32():
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:  # the record is still what torch says
        lists = pathlib.Path(spec.origin).parent / "testing/_internal/autocast_test_lists.py"
        text = lists.read_text()
        start = text.index("self.torch_fp32")
        part = text[start : text.index("self.torch_need", start)]
        assert set(re.findall(r'\("(\w+)"', part)) >= TORCH_FP32
    ours = {
        "acos": jnp.arccos, "asin": jnp.arcsin, "cosh": lax.cosh, "erfinv": lax.erf_inv,
        "exp": jnp.exp, "expm1": jnp.expm1, "log": jnp.log, "log10": jnp.log10, "log2": jnp.log2,
        "log1p": jnp.log1p, "rsqrt": lax.rsqrt, "sinh": lax.sinh, "tan": jnp.tan,
        "pow": lambda x: x**1.5, "softmax": jax.nn.softmax, "log_softmax": jax.nn.log_softmax,
        "sum": jnp.sum, "prod": jnp.prod, "cumsum": jnp.cumsum, "cumprod": jnp.cumprod,
        "norm": jnp.linalg.norm,
    }  # fmt: skip
    assert set(ours) == TORCH_FP32
    x = rounded((4, 6), low=0.2, high=0.9)
    for name in sorted(ours):
        got = jt.autocast(through_product(ours[name]))(x)
        # computed in float32 from the same half input: the plain function of x
        np.testing.assert_allclose(got, ours[name](x), rtol=1e-5, err_msg=name)


# Numbers, wider formats, and what the author asked for.


def test_a_number_in_the_code_adapts_to_its_operand():
    f = jt.autocast(lambda x: jnp.tanh((x @ x) * 0.5 + 1.0))
    assert ran_in(f, "mul", jnp.ones((2, 2))) == [{"bfloat16"}]


@pytest.mark.parametrize("number", [1e-8, -1e30, 7e4])
def test_a_number_that_half_cannot_hold_widens_the_operation(number):
    f = lambda x: jnp.tanh(x @ x + number)
    x = jnp.ones((2, 2))
    assert ran_in(jt.autocast(f, "float16"), "add", x) == [{"float32"}]
    assert ran_in(jt.autocast(f, "bfloat16"), "add", x) == [{"bfloat16"}]


def test_a_masked_softmax_in_float16_has_no_infinite_mask():
    x = jnp.ones((2, 2))
    f = jt.autocast(lambda x: jax.nn.softmax(jnp.where(x > 5, x @ x, -1e30)), "float16")
    np.testing.assert_allclose(f(x), 0.5)


def test_softmax_of_a_half_product_is_that_of_float32():
    x = rounded((8, 16), low=-20, high=20)
    f = jt.autocast(through_product(jax.nn.softmax))
    assert ran_in(f, "sub", x) == [{"float32"}]
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
        assert ran_in(f, "dot_general", x) == [{"float64"}]
        assert ran_in(f, "exp", x) == [{"float64"}]


def test_a_product_that_was_written_in_half_is_left_alone():
    x = jnp.ones((2, 2), jnp.bfloat16)
    assert ran_in(jt.autocast(lambda x: x @ x, "float16"), "dot_general", x) == [{"bfloat16"}]


def test_integers_and_complex_numbers_are_left_alone():
    n, z = jnp.ones((2, 2), jnp.int32), jnp.ones((2, 2), jnp.complex64)
    f = jt.autocast(lambda n, z: (n @ n, jnp.exp(z) @ z, jnp.abs(z)))
    assert [o.dtype.name for o in f(n, z)] == ["int32", "complex64", "float32"]


def test_a_preferred_element_type_wider_than_the_operands_is_kept():
    half = jnp.ones((2, 2), jnp.bfloat16)
    dot = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    f = jt.autocast(lambda a, b: jnp.tanh(dot(a, b)))
    assert ran_in(f, "tanh", half, half) == [{"float32"}]
    with jax.enable_x64(True):
        wide = functools.partial(jnp.matmul, preferred_element_type=jnp.float64)
        single = jnp.ones((2, 2), jnp.float32)
        assert _products(jt.autocast(lambda a: wide(a, a)), single) == {"float64"}
    # jnp asks for float32 by itself where both operands are: that is nobody's wish
    full = jnp.ones((2, 2))
    assert ran_in(f, "tanh", full, full) == [{"bfloat16"}]


@pytest.mark.parametrize(
    "precision", [lax.Precision.HIGHEST, lax.DotAlgorithmPreset.F32_F32_F32, "highest"]
)
def test_a_product_of_highest_precision_is_left_alone(precision):
    f = jt.autocast(lambda x: jnp.matmul(x, x, precision=precision))
    assert ran_in(f, "dot_general", jnp.ones((2, 2))) == [{"float32"}]


def test_the_authors_own_rounding_is_kept():
    x = jnp.full((2,), 1.001)
    f = jt.autocast(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32) * 1.0)
    np.testing.assert_array_equal(f(x), 1.0)


def test_a_bias_leaves_its_product_in_half_and_a_residual_does_not():
    x, w, b = jnp.ones((4, 8)), jnp.ones((8, 6)), jnp.full((6,), 0.001)
    biased = jt.autocast(lambda x, w, b: jnp.tanh(x @ w + b))
    assert ran_in(biased, "tanh", x, w, b) == [{"bfloat16"}]
    residual = jt.autocast(lambda x, w, b: jnp.tanh(x @ w + b))
    assert ran_in(residual, "tanh", x, w, jnp.ones((4, 6))) == [{"float32"}]


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


# Every construct, and every order of transformations.


def _scan(w, x):
    def body(c, _):
        c = jnp.tanh(c @ w)
        return c, c.sum()

    c, sums = lax.scan(body, x, None, length=3)
    return c.sum() + sums.sum()


def _while(w, x):
    return lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(s[1] @ w)), (0, x))[1]


@jax.custom_jvp
def _tripled(w, x):
    return jnp.sin(x @ w)


@_tripled.defjvp
def _tripled_jvp(primals, tangents):  # three times the true derivative, to see which rule is used
    (w, x), (dw, dx) = primals, tangents
    return _tripled(w, x), 3 * jnp.cos(x @ w) * (dx @ w + x @ dw)


@jax.custom_vjp
def _doubled(w, x):
    return jnp.tanh(x @ w)


def _doubled_fwd(w, x):
    y = jnp.tanh(x @ w)
    return y, (w, x, y)


def _doubled_bwd(residuals, ct):  # twice the true derivative for w
    w, x, y = residuals
    ct = ct * (1 - y**2)
    return 2 * (x.T @ ct), ct @ w.T


_doubled.defvjp(_doubled_fwd, _doubled_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fixed_point(f, w, x):
    return lax.while_loop(lambda s: s[1] < 30, lambda s: (f(w, x, s[0]), s[1] + 1), (x * 0, 0))[0]


def _fixed_point_fwd(f, w, x):
    z = _fixed_point(f, w, x)
    return z, (w, x, z)


def _fixed_point_bwd(f, residuals, ct):
    w, x, z = residuals
    vjp_z = jax.vjp(lambda z: f(w, x, z), z)[1]
    u = lax.fori_loop(0, 30, lambda _, u: ct + vjp_z(u)[0], ct)
    return jax.vjp(lambda w, x: f(w, x, z), w, x)[1](u)


_fixed_point.defvjp(_fixed_point_fwd, _fixed_point_bwd)

CONSTRUCTS = {
    "plain": lambda w, x: jax.nn.logsumexp(jax.nn.relu(x @ w) @ w),
    "jit": lambda w, x: jax.jit(lambda w, x: jax.jit(jax.nn.softmax)(x @ w) @ w)(w, x).sum(),
    "scan": _scan,
    "nested_scan": lambda w, x: lax.scan(
        lambda c, _: (lax.scan(lambda d, _: (jnp.tanh(d @ w), None), c, None, length=2)[0], None),
        x,
        None,
        length=2,
    )[0].sum(),
    "scan_xs": lambda w, x: lax.scan(
        lambda c, layer: (jnp.tanh(c @ layer), c), x, jnp.stack([w, w.T])
    )[1].sum(),
    "while": lambda w, x: _while(w, x).sum(),
    "fori": lambda w, x: lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ w), x).sum(),
    "cond": lambda w, x: lax.cond(x.sum() > 0, lambda: (x @ w).sum(), lambda: jnp.exp(x @ w).sum()),
    "switch": lambda w, x: lax.switch(
        1, [lambda a: a @ w, lambda a: jnp.sin(a @ w), lambda a: a], x
    ).sum(),
    "remat": lambda w, x: jax.checkpoint(lambda w, x: jnp.tanh(jnp.tanh(x @ w) @ w))(w, x).sum(),
    "scan_remat": lambda w, x: lax.scan(
        jax.checkpoint(lambda c, _: (jnp.tanh(c @ w), None)), x, None, length=3
    )[0].sum(),
    "custom_jvp": lambda w, x: _tripled(w, x).sum(),
    "custom_vjp": lambda w, x: _doubled(w, x).sum(),
    "scan_custom_vjp": lambda w, x: lax.scan(
        lambda c, _: (_doubled(w, c), None), x, None, length=3
    )[0].sum(),
    "implicit": lambda w, x: jnp.sum(_fixed_point(lambda w, x, z: jnp.tanh(z @ w * 0.2 + x), w, x)),
    "vmap": lambda w, x: jax.vmap(lambda row: jax.nn.silu(row @ w))(x).sum(),
    "grad_inside": lambda w, x: jnp.sum(jax.grad(lambda w: jnp.sin(x @ w).sum())(w) ** 2),
}
_cast = jt.autocast
ORDERS = {
    "autocast": (lambda f: _cast(f), lambda f: f),
    "jit(autocast)": (lambda f: jax.jit(_cast(f)), lambda f: f),
    "grad(autocast)": (lambda f: jax.jit(jax.grad(_cast(f))), jax.grad),
    "autocast(grad)": (lambda f: jax.jit(_cast(jax.grad(f))), jax.grad),
    "jvp(autocast)": (lambda f: lambda w, x: jax.jvp(_cast(f), (w, x), (w, x))[1],
                      lambda f: lambda w, x: jax.jvp(f, (w, x), (w, x))[1]),
    "vmap(grad(autocast))": (lambda f: jax.jit(jax.vmap(jax.grad(_cast(f)))),
                             lambda f: jax.vmap(jax.grad(f))),
    "autocast(vmap(grad))": (lambda f: jax.jit(_cast(jax.vmap(jax.grad(f)))),
                             lambda f: jax.vmap(jax.grad(f))),
    "autocast(autocast)": (lambda f: _cast(_cast(f)), lambda f: f),
}  # fmt: skip
NOT_REVERSE = {"while"}  # JAX has no reverse mode for while_loop,
NOT_FORWARD = {"custom_vjp", "scan_custom_vjp", "implicit"}  # and no forward mode for custom_vjp


def _products(fn, *args):
    return {
        e.outvars[0].aval.dtype.name
        for e in equations(jax.make_jaxpr(fn)(*args))
        if e.primitive.name == "dot_general"
    }


EVERY_TIME = {"autocast", "grad(autocast)", "autocast(grad)"}


def _cases():
    """Each construct in each order that JAX itself can do; the rarer pairs are slow tests."""
    for construct in sorted(CONSTRUCTS):
        for order in sorted(ORDERS):
            if order.startswith("jvp") and construct in NOT_FORWARD:
                continue
            if "grad" in order and construct in NOT_REVERSE:
                continue
            quick = order in EVERY_TIME or construct in ("plain", "scan", "custom_vjp")
            marks = () if quick else (pytest.mark.slow,)
            yield pytest.param(construct, order, marks=marks)


@pytest.mark.parametrize("construct,order", list(_cases()))
def test_every_construct_in_every_order(construct, order):
    f, (ours, plain) = CONSTRUCTS[construct], ORDERS[order]
    w, x = jnp.asarray(rounded((6, 6), low=-0.5, high=0.5)), jnp.asarray(rounded((3, 6), seed=1))
    args = (jnp.stack([w, w / 2]), jnp.stack([x, x / 2])) if "vmap" in order else (w, x)
    got, want = ours(f)(*args), plain(f)(*args)
    assert got.dtype == want.dtype
    # A few roundings to bfloat16 along the chain, of terms of order one (some sums cancel).
    np.testing.assert_allclose(got, want, atol=12 * BF16_EPS * max(1.0, float(jnp.abs(want).max())))
    assert _products(ours(f), *args) == {"bfloat16"}


@pytest.mark.parametrize("construct", ["jit", "scan", "remat", "custom_vjp", "implicit"])
def test_float16_agrees_more_closely(construct):
    f = CONSTRUCTS[construct]
    w, x = jnp.asarray(rounded((6, 6), low=-0.5, high=0.5)), jnp.asarray(rounded((3, 6), seed=1))
    got, want = jax.grad(jt.autocast(f, "float16"))(w, x), jax.grad(f)(w, x)
    np.testing.assert_allclose(got, want, atol=12 * 2.0**-11 * float(jnp.abs(want).max()))


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


def test_name_scopes_and_source_lines_are_kept():
    def f(x):
        with jax.named_scope("attention"):
            return x @ x

    eqns = equations(jax.make_jaxpr(jt.autocast(f))(jnp.ones((2, 2))))
    dot = next(e for e in eqns if e.primitive.name == "dot_general")
    assert str(dot.source_info.name_stack).endswith("attention")
    text = jax.jit(jt.autocast(f)).lower(jnp.ones((2, 2))).as_text(debug_info=True)
    assert "test_autocast.py" in text


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


# Derivative rules of the user's.


def test_custom_derivative_rules_are_the_ones_used():
    w, x = jnp.asarray(rounded((6, 6), low=-0.5, high=0.5)), jnp.asarray(rounded((3, 6), seed=1))
    for fn, times, plain in ((_tripled, 3, jnp.sin), (_doubled, 2, jnp.tanh)):
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


@pytest.mark.parametrize("rule", [_jax_compat.jvp_rule, _jax_compat.vjp_rule])
def test_a_layout_that_is_not_known_is_an_error_with_the_version_and_what_to_do(rule):
    with pytest.raises(_jax_compat.JaxLayoutError, match=f"in jax {jax.__version__}; .*with_prec"):
        rule({}, [True])


def test_relu_keeps_half_and_its_derivative_at_zero():
    w = jnp.eye(2)
    f = jt.autocast(lambda x: jax.nn.relu(x @ w))
    assert ran_in(f, "max", jnp.ones((2, 2))) == [{"bfloat16"}]
    np.testing.assert_array_equal(jax.grad(lambda x: f(x).sum())(jnp.zeros((2, 2))), 0.0)


def test_residuals_of_a_custom_rule_are_kept_in_half():
    w, x = jnp.ones((8, 8)), jnp.ones((4, 8))
    f = jt.autocast(lambda w: _doubled(w, _doubled(w, x)).sum())
    kept = jax.tree.leaves(jax.eval_shape(lambda w: jax.vjp(f, w)[1], w))
    assert collections.Counter(r.dtype.name for r in kept if r.shape == (4, 8))["bfloat16"] >= 2


# Regions.


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
        return jnp.tanh(_doubled(x, x) @ jax.jit(lambda x: x @ x)(x))

    x = jnp.asarray(rounded((3, 3, 3)))
    for f in (jt.autocast(transform(region)), transform(jt.autocast(region))):
        assert _products(f, x) == {"float32"}
    np.testing.assert_array_equal(jax.jit(jt.autocast(region))(x[0]), jax.jit(region)(x[0]))


def test_a_region_is_a_context_manager_and_can_be_in_half():
    def f(x):
        with jt.with_precision("bfloat16"):
            y = jnp.exp(x)
        with jt.with_precision("float16"), jt.with_precision("float32"):
            return x @ x, y

    x = jnp.ones((2, 2))
    assert ran_in(jt.autocast(f), "exp", x) == [{"bfloat16"}]
    assert ran_in(jt.autocast(f), "dot_general", x) == [{"float32"}]


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
    assert _products(off, x) == {"float32"}


# Casts are not repeated.


def test_a_weight_is_cast_once_outside_a_scan():
    w, x = jnp.ones((8, 8)), jnp.ones((4, 8))
    for f in (jt.autocast(_scan), jax.grad(jt.autocast(_scan)), jt.autocast(jax.grad(_scan))):
        assert casts(f, w, x, shape=(8, 8)) == 1
    nested = jt.autocast(CONSTRUCTS["nested_scan"])
    assert casts(nested, w, x, shape=(8, 8)) == 1
    loop = jt.autocast(CONSTRUCTS["fori"])
    assert casts(loop, w, x, shape=(8, 8)) == 1
    text = jax.jit(jt.autocast(_scan)).lower(w, x).as_text()
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


def test_bits_of_a_number_are_those_of_its_own_dtype():
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


def test_shard_map_on_four_devices():
    program = """
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import AxisType, PartitionSpec as P
        import jmp_train as jt
        from tests.precision.test_autocast import _products
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
            assert _products(g, w, x) == {"bfloat16"}, _products(g, w, x)
            got = jax.jit(g)(w, x)
            np.testing.assert_allclose(got, want, atol=0.03 * float(jnp.abs(want).max()))
        def local(w, x):  # autocast inside shard_map
            return jt.autocast(lambda w, x: jax.lax.psum(jnp.sum(x @ w), "i"))(w, x)
        inner = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("i")), out_specs=P())
        np.testing.assert_allclose(inner(w, x), (x @ w).sum(), rtol=0.05, atol=0.1)
        assert _products(inner, w, x) == {"bfloat16"}
        print("done", len(jax.devices()))
    """
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    env["PYTHONPATH"] = os.pathsep.join([os.getcwd(), env.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "done 4" in done.stdout, done.stderr[-2000:]


# The report.


def test_the_report_names_path_dtype_rule_and_source():
    def f(w, x):
        c, _ = lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=2)
        with jt.with_precision("float32"):
            z = c @ w
        return jnp.exp(c @ w).sum() + z.sum() + jnp.linalg.cholesky(w).sum()

    x = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    report = jt.explain_autocast(f, x, x)
    rows = {(r.path, r.op): r for r in report.rows}
    assert (rows["scan", "dot_general"].dtype, rows["scan", "dot_general"].rule) == (
        "bfloat16",
        "compute",
    )
    assert {r.rule for r in report.rows if r.op == "dot_general"} == {"compute", "region"}
    assert rows["", "exp"].rule == "float32"
    assert any(r.op == "cholesky" and r.rule == "as written" for r in report.rows)
    assert "test_autocast.py" in rows["scan", "tanh"].source
    lines = str(report).splitlines()
    column = lines[0].index("runs in")
    assert all(
        line[column:].startswith(r.dtype) for line, r in zip(lines[1:], report.rows, strict=True)
    )


def test_the_report_agrees_with_what_is_emitted():
    w, x = jnp.ones((6, 6)), jnp.ones((3, 6))
    for construct in ("plain", "jit", "scan", "cond", "remat", "vmap"):
        f = CONSTRUCTS[construct]
        told = collections.Counter(
            (r.op, r.dtype)
            for r in jt.explain_autocast(f, w, x).rows
            if r.op in ("tanh", "dot_general", "exp")
        )
        seen = collections.Counter(
            (e.primitive.name, e.invars[0].aval.dtype.name)
            for e in equations(jax.make_jaxpr(jt.autocast(f))(w, x))
            if e.primitive.name in ("tanh", "dot_general", "exp")
        )
        assert told == seen
