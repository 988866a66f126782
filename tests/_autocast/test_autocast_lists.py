"""Each primitive runs in the dtype that its list says; its value is that of float64."""

import importlib.util
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from helpers.arrays import BF16_EPS, F32_EPS, rounded, through_product
from helpers.programs import equations, operand_dtypes
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

import jmp_train as jt


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
    assert operand_dtypes(f, "tanh", x) == [{dtype}, {dtype}]


def test_a_users_primitive_runs_as_written_until_a_rule_names_it():
    twice = Primitive("twice_for_test")
    twice.def_abstract_eval(lambda a: a)
    twice.def_impl(lambda a: a + a)
    mlir.register_lowering(twice, mlir.lower_fun(lambda a: a + a, multiple_results=False))
    f, x = through_product(twice.bind), jnp.ones((2, 2))
    assert operand_dtypes(jt.autocast(f), "twice_for_test", x) == [{"float32"}]
    rules = jt.default_op_rules.extend(compute=[twice])
    assert operand_dtypes(jt.autocast(f, rules=rules), "twice_for_test", x) == [{"bfloat16"}]


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
    assert set(map(frozenset, operand_dtypes(f, name, x))) == {frozenset({"float32"})}
    if oracle is not None:
        # Special functions in float32 are good to some 100 ulp; bfloat16 would be 300 times worse.
        np.testing.assert_allclose(f(x), oracle(x.astype(np.float64)), rtol=400 * F32_EPS)


def test_the_derivatives_of_max_pooling_add_in_float32():
    pool = lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 2), (1, 1), "VALID")
    x = jnp.asarray(rounded((4, 6)))
    f = through_product(pool)
    back = jt.autocast(lambda x: jax.vjp(f, x)[1](jnp.ones((4, 5))))
    assert operand_dtypes(back, "select_and_scatter_add", x) == [{"float32"}]
    forward = jt.autocast(lambda x: jax.jvp(f, (x,), (x,)))
    assert operand_dtypes(forward, "select_and_gather_add", x) == [{"float32"}]


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
    assert {"bfloat16"} in operand_dtypes(f, name, x)
    want = np.tanh(oracle(x.astype(np.float64)))
    np.testing.assert_allclose(f(x), want, rtol=6 * BF16_EPS, atol=6 * BF16_EPS)


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_a_scatter_applies_its_function_to_a_half_operand(half):
    x = rounded((4, 6))
    got = jt.autocast(through_product(lambda x: x.at[1].apply(jnp.sin)), half)(x)
    want = np.r_[x[:1], np.sin(x[1:2]), x[2:]]
    np.testing.assert_allclose(got, want, rtol=BF16_EPS, atol=BF16_EPS)


@pytest.mark.parametrize("name", sorted(PROMOTE_OPS))
def test_operations_on_float32_alone_stay_in_float32(name):
    x = jnp.asarray(rounded((4, 6)))
    assert {"float32"} in operand_dtypes(jt.autocast(PROMOTE_OPS[name][0]), name, x)
    np.testing.assert_array_equal(jt.autocast(PROMOTE_OPS[name][0])(x), PROMOTE_OPS[name][0](x))


def test_mixed_operands_promote_to_the_widest():
    x = jnp.ones((2, 2))
    f = jt.autocast(lambda x, y: jnp.tanh((x @ x) * y))
    assert operand_dtypes(f, "mul", x, x) == [{"float32"}]


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
