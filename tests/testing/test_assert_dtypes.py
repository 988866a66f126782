"""What runs in which dtype, in every construct of JAX; a failure names operation and line."""

import dataclasses
import functools
import re
import subprocess
import sys

import equinox
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from helpers.constructs import CONSTRUCTS
from jax import lax

import jmp_train as jt
from jmp_train.testing import (
    assert_contractions_in,
    assert_costs_nothing,
    assert_no_dtype,
    assert_no_host_sync,
    assert_reductions_in,
)

W, X = jax.ShapeDtypeStruct((6, 6), jnp.float32), jax.ShapeDtypeStruct((3, 6), jnp.float32)
HALF = jax.ShapeDtypeStruct((3, 6), jnp.bfloat16)


def line_of(words):
    """The number of the line of this file that has a comment."""
    with open(__file__, encoding="utf8") as file:
        lines = enumerate(file, 1)
        return next(n for n, line in lines if line.rstrip().endswith(f"# {words}"))


@pytest.mark.parametrize("construct", CONSTRUCTS)
def test_products_are_found_in_every_construct(construct):
    fn = CONSTRUCTS[construct]
    assert_contractions_in(fn, W, X, dtype="float32")
    assert_contractions_in(jt.autocast(fn), W, X)
    with pytest.raises(AssertionError, match="every contraction in bfloat16") as caught:
        assert_contractions_in(fn, W, X)
    # StableHLO is made by JAX's lowering, which enters the bodies by itself.
    count = jax.jit(fn).lower(W, X).as_text().count("stablehlo.dot_general")
    assert re.search(rf"found {count} of {count} in another dtype", str(caught.value))
    assert "helpers/constructs.py:" in str(caught.value)


@jax.custom_jvp
def forward(w, x):
    return jnp.sin(x) + w.astype(x.dtype).sum()


@forward.defjvp
def forward_jvp(primals, tangents):
    (w, x), (_, dx) = primals, tangents
    wide = x.astype(jnp.float32) @ w  # product of the jvp rule
    return forward(w, x), dx * wide.astype(x.dtype)


@jax.custom_vjp
def backward(w, x):
    return jnp.sin(x) + w.astype(x.dtype).sum()


def backward_of(w, ct):
    return w, (ct.astype(jnp.float32) @ w).astype(ct.dtype)


backward.defvjp(lambda w, x: (backward(w, x), w), backward_of)


def loss(fn, loop, w, x):
    y = x.astype(jnp.bfloat16)
    if loop:
        y = lax.scan(lambda c, _: (fn(w, c), None), y, None, length=2)[0]  # call in the loop
    y = fn(w, y)  # call
    return (y @ w.astype(y.dtype)).astype(jnp.float32).sum()


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("fn,words", [(forward, "product of the jvp rule"), (backward, "call")])
def test_a_product_of_a_rule_is_named_at_its_line_or_that_of_the_call(fn, words, loop):
    fn = functools.partial(loss, fn, loop)
    assert_contractions_in(fn, W, X)  # the rule is not in the program of the function itself
    with pytest.raises(AssertionError, match="every contraction in bfloat16") as caught:
        assert_contractions_in(jax.grad(fn, argnums=1), W, X)
    lines = str(caught.value).splitlines()[1:]
    assert all(line.startswith("  dot_general  float32[3,6], float32[6,6]") for line in lines)
    found = {int(n) for n in re.findall(rf"{__file__}:(\d+)", "".join(lines))}
    assert found == {line_of(words)} | ({line_of("call in the loop")} if loop else set())


def test_a_line_shows_dtypes_shapes_module_and_bodies():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Dense(4, name="body", dtype=jnp.bfloat16)(x)
            return linen.Dense(2, name="head", dtype=jnp.float32)(x)

    net = Net()
    params = jax.eval_shape(net.init, jax.random.key(0), X)
    with pytest.raises(AssertionError) as caught:
        assert_contractions_in(jax.jit(net.apply), params, X)
    head, line = str(caught.value).splitlines()
    assert head == (
        "assert_contractions_in failed: expected every contraction in bfloat16, "
        "found 1 of 2 in another dtype:"
    )
    assert line.startswith("  dot_general  float32[3,4], float32[4,2] -> float32[3,2]  in Net/head")
    assert __file__ in line


def test_modules_of_nnx_are_named_by_their_classes():
    class Head(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(6, 2, rngs=rngs)

        def __call__(self, x):
            return self.linear(x)

    head = Head(nnx.Rngs(0))
    with pytest.raises(AssertionError, match="in Head/Linear"):
        assert_contractions_in(lambda x: head(x), X)


CONTRACTIONS = {
    "dot_general": lambda x: x @ x.T,
    "conv_general_dilated": lambda x: lax.conv(
        x[None, None], x[None, None, :2, :2], (1, 1), "SAME"
    ),
    "ragged_dot_general": lambda x: lax.ragged_dot(x, x.T[None], jnp.array([3])),
}


@pytest.mark.parametrize("name", CONTRACTIONS)
def test_every_kind_of_contraction_is_checked(name):
    fn = CONTRACTIONS[name]
    assert_contractions_in(fn, HALF)
    assert_contractions_in(lambda x: lax.cond(x[0, 0] > 0, fn, fn, x), HALF)
    with pytest.raises(AssertionError, match=rf"\n  {name}  bfloat16"):
        assert_contractions_in(fn, HALF, dtype="float32")


def test_one_operand_of_another_dtype_is_enough():
    mixed = lambda x, y: lax.dot_general(x, y, (((1,), (1,)), ((), ())))
    with pytest.raises(AssertionError, match="found 1 of 1"):
        assert_contractions_in(mixed, HALF, X)


def test_a_product_of_scaled_blocks_runs_in_the_dtype_of_its_blocks():
    block = jax.ShapeDtypeStruct((64, 64), jnp.float8_e4m3fn)
    scale = jax.ShapeDtypeStruct((64, 2), jnp.float8_e8m0fnu)
    fn = lambda a, s: lax.scaled_dot(a, a, lhs_scale=s, rhs_scale=s.T)
    assert_contractions_in(fn, block, scale, dtype="float8_e4m3fn")
    with pytest.raises(AssertionError, match="float8_e4m3fn"):
        assert_contractions_in(fn, block, scale)


def test_an_algorithm_replaces_the_dtype_of_the_operands():
    dot = lambda preset: (
        lambda x: jnp.matmul(x, x.T, precision=getattr(lax.DotAlgorithmPreset, preset))
    )
    assert_contractions_in(dot("BF16_BF16_F32"), X)
    assert_contractions_in(dot("BF16_BF16_F32_X3"), X, dtype="float32")
    assert_contractions_in(dot("DEFAULT"), X, dtype="float32")
    with pytest.raises(AssertionError, match=r"computes in tf32"):
        assert_contractions_in(dot("TF32_TF32_F32"), X, dtype="float32")


def test_an_algorithm_object_replaces_the_dtype_of_the_operands():
    def dot(*types, count=1):
        algorithm = lax.DotAlgorithm(*types, jnp.float32, num_primitive_operations=count)
        return lambda x: lax.dot(x, x.T, precision=algorithm)

    assert_contractions_in(dot(jnp.bfloat16, jnp.bfloat16), X)
    assert_contractions_in(dot(jnp.bfloat16, jnp.bfloat16, count=3), X, dtype="float32")
    with pytest.raises(AssertionError, match=r"computes in bfloat16\)"):
        assert_contractions_in(dot(jnp.bfloat16, jnp.bfloat16), X, dtype="float32")
    with pytest.raises(AssertionError, match=r"computes in bfloat16 and float32\)"):
        assert_contractions_in(dot(jnp.bfloat16, jnp.float32), X)


@pytest.mark.parametrize("jit", [jax.jit, nnx.jit, equinox.filter_jit])
def test_functions_and_programs_of_every_jit_are_read(jit):
    fn = jit(lambda x: x @ x.T)
    half = jnp.ones(HALF.shape, HALF.dtype)  # `eqx.filter_jit` lowers for arrays alone
    programs = [fn.lower(half)] + ([fn.trace(half)] if hasattr(fn, "trace") else [])
    assert_contractions_in(fn, HALF)
    for program in programs:
        assert_contractions_in(program)
    for program, args in [(fn, [HALF]), *((program, []) for program in programs)]:
        with pytest.raises(AssertionError, match="found 1 of 1 in another dtype") as caught:
            assert_contractions_in(program, *args, dtype="float32")
        assert "in JitFn" not in str(caught.value)  # a class of `nnx.jit`, not a module
    with pytest.raises(ValueError, match="expected none, got 1"):
        assert_contractions_in(programs[-1], HALF)
    assert_contractions_in(fn.lower(half.astype(jnp.float32)).compile(), dtype="float32")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(eq=False)
class Layer:
    weight: jax.Array

    @jax.jit
    def of_a_pytree(self, x):
        return x @ self.weight

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def static(self, x, transposed):
        return x @ x.T if transposed else x

    @classmethod
    @functools.partial(jax.jit, static_argnums=0)
    def of_the_class(cls, x):
        return x @ x.T


class Linear(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(6, 6, rngs=nnx.Rngs(0))

    @jax.jit
    def jitted(self, x):
        return self.linear(x)

    @nnx.jit
    def jitted_by_nnx(self, x):
        return self.linear(x)

    __call__ = jitted_by_nnx


METHODS = {
    "pytree": lambda: (Layer(jnp.ones((6, 6))).of_a_pytree,),
    "static": lambda: (Layer(jnp.ones((6, 6))).static, True),
    "class": lambda: (Layer.of_the_class,),
    "nnx": lambda: (Linear().jitted,),
    "nnx.jit": lambda: (Linear().jitted_by_nnx,),
    "module": lambda: (Linear(),),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_bound_method_of_a_jitted_function_is_read(name):
    method, *rest = METHODS[name]()
    assert_contractions_in(method, X, *rest, dtype="float32")
    with pytest.raises(AssertionError, match="found 1 of 1 in another dtype"):
        assert_contractions_in(method, X, *rest)
    assert_no_host_sync(method, jnp.ones(X.shape), *rest)
    with pytest.raises(AssertionError, match="FLOPs"):
        assert_costs_nothing(method, lambda x, *_: x, X, *rest)


def test_functions_of_a_module_that_is_an_argument_are_static():
    module = equinox.nn.MLP(6, 2, 4, 1, key=jax.random.key(0))
    for wrap in (lambda f: f, equinox.filter_jit, equinox.filter_grad):
        fn = wrap(lambda module, x: jax.vmap(module)(x).sum())
        assert_contractions_in(fn, module, X, dtype="float32")
        assert_reductions_in(fn, module, X)
        assert_no_dtype(fn, module, X, dtype="bfloat16")
        with pytest.raises(AssertionError, match="every contraction in bfloat16"):
            assert_contractions_in(fn, module, X)
    assert_contractions_in(lambda x, flag: x @ x.T if flag else x, HALF, True)


def add_twice(a, b):
    return a + b * np.array(2, b.dtype)


REDUCTIONS = {
    "reduce": lambda x: lax.reduce(x, np.zeros((), x.dtype), add_twice, (0,)),
    "reduce_window": lambda x: lax.reduce_window(
        x, np.zeros((), x.dtype), add_twice, (1, 2), (1, 2), "VALID"
    ),
    "reduce_sum": lambda x: lax.reduce_sum(x, axes=(0,)),
    "reduce_prod": lambda x: lax.reduce_prod(x, axes=(0,)),
    "cumsum": lax.cumsum,
    "cumprod": lax.cumprod,
    "cumlogsumexp": lax.cumlogsumexp,
    "reduce_window_sum": lambda x: lax.reduce_window(
        x, np.zeros((), x.dtype), lax.add, (1, 2), (1, 2), "VALID"
    ),
    "scatter-add": lambda x: x.at[jnp.array([0, 0])].add(x[:2]),
    "scatter-sub": lambda x: x.at[jnp.array([0, 0])].subtract(x[:2]),
    "scatter-mul": lambda x: x.at[jnp.array([0, 0])].multiply(x[:2]),
    "select_and_scatter_add": jax.grad(
        lambda x: lax.reduce_window(
            x, -jnp.inf, lax.max, (1, 2), (1, 2), "VALID"
        )[0, 0]
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "wrap", [lambda f: f, jax.checkpoint, lambda f: lambda x: lax.map(f, x[None])]
)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_every_kind_of_reduction_is_checked(name, wrap):
    fn = wrap(REDUCTIONS[name])
    assert_reductions_in(fn, HALF, dtype="bfloat16")
    assert_reductions_in(fn, X)
    with pytest.raises(AssertionError, match=rf"every reduction in float32(.|\n)*\n  {name}  bf"):
        assert_reductions_in(fn, HALF)


def test_a_mean_that_adds_in_bfloat16_is_told_from_one_that_does_not():
    assert_reductions_in(jnp.mean, HALF)

    def naive(x):
        return lax.reduce_sum(x, axes=(0, 1)) / x.size  # naive mean

    with pytest.raises(AssertionError, match=rf"{__file__}:{line_of('naive mean')} \(.*naive\)"):
        assert_reductions_in(jax.jit(naive), HALF)


@pytest.mark.parametrize("reduce", [lax.reduce_sum, lax.reduce_prod])
def test_a_sum_of_one_number_may_have_any_dtype(reduce):
    assert_reductions_in(lambda x: reduce(x[:, None], axes=(1,)), HALF)
    two = lambda x: reduce(x.reshape(9, 2), axes=(1,))
    with pytest.raises(AssertionError, match="found 1 of 1 in another dtype"):
        assert_reductions_in(two, HALF)


def test_the_gradient_of_a_new_axis_adds_nothing_up():
    loss = lambda x: (x[:, None] * 2).astype(jnp.float32).sum()
    assert_reductions_in(jax.grad(loss), HALF)


def test_sums_of_integers_and_maxima_are_not_reductions():
    with pytest.raises(AssertionError, match="found no reduction to check"):
        assert_reductions_in(lambda x: (x.max(), jnp.arange(3).sum()), HALF)
    larger = lambda a, b: lax.max(a, lax.abs(b))
    with pytest.raises(AssertionError, match="found no reduction to check"):
        assert_reductions_in(lambda x: lax.reduce(x, np.zeros((), x.dtype), larger, (0,)), HALF)


def attention(x):
    scores = jax.nn.softmax((x @ x.T).astype(jnp.float32))  # softmax
    return scores.astype(x.dtype) @ x


SOFTMAX = (
    "exp",
    "reduce_sum",
    "reduce_max",
    "sub",
    "div",
    "broadcast_in_dim",
    "stop_gradient",
    "max",
)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, lambda f: lambda x: lax.map(f, x[None])])
def test_float32_is_allowed_to_named_operations_alone(wrap):
    assert_no_dtype(wrap(lambda x: jnp.tanh(x @ x.T)), HALF)
    assert_no_dtype(wrap(attention), HALF, except_=SOFTMAX)
    with pytest.raises(AssertionError, match="no float32 but in ") as caught:
        assert_no_dtype(wrap(attention), HALF, except_=set(SOFTMAX) - {"exp"})
    (line,) = str(caught.value).splitlines()[1:]
    assert line.startswith("  exp  float32[") and f"{__file__}:{line_of('softmax')}" in line


def test_each_operation_to_check_must_occur():
    assert_no_dtype(lambda x: jnp.log(jnp.exp(x)), HALF, only=["exp", "log"])
    with pytest.raises(AssertionError, match="found no log of floating numbers to check"):
        assert_no_dtype(jnp.exp, HALF, only=["exp", "log"])
    with pytest.raises(AssertionError, match="found no exp of floating numbers and no log"):
        assert_no_dtype(jnp.sin, HALF, only=["exp", "log"])


def test_a_cast_of_a_parameter_is_not_counted():
    assert_no_dtype(lambda w, x: x @ w.astype(x.dtype), W, HALF)
    with pytest.raises(AssertionError, match="transpose  float32"):
        assert_no_dtype(lambda w, x: x @ w.T.astype(x.dtype), W, HALF)


@pytest.mark.parametrize("check", [assert_contractions_in, assert_reductions_in, assert_no_dtype])
def test_wrong_arguments_are_refused(check):
    with pytest.raises(ValueError, match="'bfloat15'.*did you mean 'bfloat16'"):
        check(jnp.sin, X, dtype="bfloat15")
    with pytest.raises(TypeError, match="expected a function or a compiled program, got int"):
        check(3)
    with pytest.raises(ValueError, match="expected none, got 1"):
        check(jax.jit(jnp.sin).lower(X), X)


def test_an_unknown_exception_is_refused():
    with pytest.raises(ValueError, match="'reduce_sun' in except_; did you mean 'reduce_sum'"):
        assert_no_dtype(jnp.sin, HALF, except_=["exp", "reduce_sun"])


@pytest.mark.parametrize(
    "check,kind",
    [
        (assert_contractions_in, "contraction"),
        (assert_reductions_in, "reduction"),
        (assert_no_dtype, "operation on floating numbers"),
    ],
)
def test_nothing_to_check_is_a_failure(check, kind):
    integers = jax.ShapeDtypeStruct((3,), jnp.int32)
    with pytest.raises(AssertionError, match=f"found no {kind} to check"):
        check(lambda n: n + 1, integers)


def test_products_of_integers_are_not_checked():
    integers = jax.ShapeDtypeStruct((3, 3), jnp.int32)
    with pytest.raises(AssertionError, match="found no contraction"):
        assert_contractions_in(lambda n: n @ n, integers)
    assert_contractions_in(lambda n, x: (n @ n, x @ x.T), integers, HALF)


def exported(fn, *args, platform="cpu"):
    return jax.export.export(jax.jit(fn), platforms=[platform])(*args).call


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, lambda f: lambda x: lax.map(f, x[None])])
def test_a_product_in_an_exported_function_is_found(wrap, platform):
    call = exported(lambda x: x @ x.T, X, platform=platform)
    assert_contractions_in(wrap(call), X, dtype="float32")
    half = lambda x: x.astype(jnp.bfloat16) @ x.T.astype(jnp.bfloat16)
    with pytest.raises(AssertionError, match="found 1 of 2") as caught:
        assert_contractions_in(wrap(lambda x: (call(x), half(x))), X)
    assert "call_exported:<lambda>  at " in str(caught.value)


def test_an_exported_function_of_trees_and_any_shape_is_read():
    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape("rows, 6"), jnp.bfloat16)
    call = exported(lambda tree: lax.reduce_sum(tree["x"], axes=(0, 1)), {"x": shape})
    fn = lambda x: call({"x": x})
    assert_reductions_in(fn, HALF, dtype="bfloat16")
    with pytest.raises(AssertionError, match=r"reduce  bfloat16\[\?,6\]"):
        assert_reductions_in(fn, HALF)


def test_a_function_exported_with_a_broadcast_to_any_length_is_one_operation():
    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape("rows, 6"), jnp.float32)
    call = exported(jax.nn.softmax, shape)
    assert_contractions_in(lambda x: call(x @ jnp.ones((6, 6))), X, dtype="float32")


def test_an_operation_in_an_exported_function_has_both_names():
    call = exported(jnp.exp, X)
    for name in ("exp", "exponential"):
        with pytest.raises(AssertionError, match=f"no float32 in {name}, found 1 of 1"):
            assert_no_dtype(call, X, only=[name])


def test_a_function_is_traced_anew_at_each_assertion():
    dtype = [jnp.bfloat16]
    fn = lambda x: x.astype(dtype[0]) @ x.T.astype(dtype[0])
    assert_contractions_in(fn, X)
    dtype[0] = jnp.float32
    assert_contractions_in(fn, X, dtype="float32")


def test_a_kernel_of_pallas_is_entered():
    from jax.experimental import pallas as pl

    def kernel(x_ref, o_ref):
        o_ref[...] = x_ref[...] @ x_ref[...]

    square = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    fn = pl.pallas_call(kernel, out_shape=square, interpret=True)
    assert_contractions_in(fn, square, dtype="float32")
    with pytest.raises(AssertionError, match="inside pallas_call"):
        assert_contractions_in(fn, square)


def test_it_imports_without_pytest_hypothesis_and_flax():
    code = """
import sys
sys.modules.update(pytest=None, hypothesis=None, flax=None)
import jmp_train
assert "jmp_train.testing" not in sys.modules
jmp_train.testing.assert_same_bits(1, 1)
assert list(jmp_train.testing.__all__) == sorted(jmp_train.testing.__all__)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_at_most_ten_operations_are_listed():
    power = lambda w, x: functools.reduce(lambda y, _: y @ w, range(13), x)
    with pytest.raises(AssertionError, match="found 13 of 13") as caught:
        assert_contractions_in(power, W, X)
    assert (
        str(caught.value).endswith("\n  and 3 more") and len(str(caught.value).splitlines()) == 12
    )
