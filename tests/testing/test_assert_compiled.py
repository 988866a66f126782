"""Compiled programs are read by their text: products of every library, reductions, fusions, lines."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from helpers.constructs import CONSTRUCTS
from helpers.hlo import all_reduced, custom_calls
from jax import lax

import jmp_train as jt
from jmp_train.testing import assert_contractions_in, assert_no_dtype, assert_reductions_in
from jmp_train.testing.hlo import hlo_operations
from jmp_train.testing.operations import ArrayType

W, X = jax.ShapeDtypeStruct((6, 6), jnp.float32), jax.ShapeDtypeStruct((3, 6), jnp.float32)
HALF = jax.ShapeDtypeStruct((3, 6), jnp.bfloat16)

# Lines of programs that XLA made for an H100 (jax 0.10.2), shortened: of a Triton fusion, with Triton
# off, of cuDNN's attention and convolutions, and over two devices.
PROGRAM = """
%gemm_fusion_dot.1_computation (parameter_0.16: bf16[1024,128], parameter_1.16: f32[128,640]) -> bf16[1024,640] {
  %parameter_0.16 = bf16[1024,128]{1,0} parameter(0)
  %parameter_1.16 = f32[128,640]{1,0} parameter(1)
  ROOT %dot.78 = bf16[1024,640]{1,0} dot(%parameter_0.16, %parameter_1.16), lhs_contracting_dims={1}
}

ENTRY %main.5 (x: f16[1024,128]) -> f16[1024,384] {
  %bitcast.61.0 = f16[1024,128]{1,0} bitcast(%loop_multiply_fusion.1)
  %bitcast.62.0 = f16[128,384]{1,0} bitcast(%dynamic_slice.3)
  %custom-call.30 = (f16[1024,384]{1,0}, s8[4194304]{0}) custom-call(%bitcast.61.0, %bitcast.62.0), custom_call_target="__cublas$lt$matmul", metadata={}
  %fusion = bf16[8,2,128,64]{3,1,2,0} fusion(%bitcast.61.0), kind=kLoop, calls=%gemm_fusion_dot.1_computation
  %dot_product_attention_fwd.10 = (bf16[8,2,128,64]{3,1,2,0}, f32[8,2,128]{2,1,0}, u8[0]{0}) custom-call(%fusion, %fusion, %bitcast.61.0), custom_call_target="__cudnn$fmhaSoftmax", metadata={}
  %all-reduce-start.1 = f32[2]{0} all-reduce-start(%wrapped_concatenate.2), channel_id=1
  %all-reduce-start = bf16[410240]{0} all-reduce-start(%wrapped_concatenate.1), channel_id=1
  %all-reduce-done = bf16[410240]{0} all-reduce-done(%all-reduce-start), metadata={}
}
"""
# As XLA writes a TPU's layouts and convolutions, cuDNN's convolutions and cuBLAS's solver.
OTHERS = """
ENTRY %main.1 (p: bf16[8,128]) -> bf16[8,128] {
  %p0 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = (f32[128]{0:T(128)}, /*index=1*/f8e4m3fn[128,128]{1,0}) parameter(1)
  %weight = f8e4m3fn[128,128]{1,0} get-tuple-element(%p1), index=1
  %convolution.1 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} convolution(%p0, %weight), dim_labels=bf_io->bf
  %cudnn-conv.1 = (f32[8,128]{1,0}, u8[0]{0}) custom-call(%p0, %p0), custom_call_target="__cudnn$convForward"
  %cublas.2 = (f32[8,8]{1,0}, s8[0]{0}) custom-call(%p0, %p0), custom_call_target="__cublas$triangularSolve"
  %dot.3 = f32[8,8]{1,0} dot(%p0, %p0), lhs_contracting_dims={1}, algorithm=dot_tf32_tf32_f32
}
"""

# A fusion that XLA for an H100 starts beside another (jax 0.11.2), shortened: it reads float32.
BESIDE = """
%fused_add (param_0: f32[16,32]) -> bf16[16,32] {
  %param_0 = f32[16,32]{1,0} parameter(0)
  %convert.4 = bf16[16,32]{1,0} convert(%param_0)
  ROOT %add.1 = bf16[16,32]{1,0} add(%convert.4, %convert.4)
}

ENTRY %main.2 (x: f32[16,32]) -> bf16[16,32] {
  %x = f32[16,32]{1,0} parameter(0)
  %fusion-start = ((f32[16,32]{1,0}), bf16[16,32]{1,0}, u32[]) fusion-start(%x), kind=kLoop, calls=%fused_add
  ROOT %fusion-done = bf16[16,32]{1,0} fusion-done(%fusion-start)
}
"""


def products(text):
    return [
        (op.name, tuple(x.dtype for x in op.operands[:2]))
        for op in hlo_operations(text)
        if op.name in ("dot", "convolution") or op.name.startswith("__")
    ]


def test_programs_are_read_as_xla_writes_them():
    assert products(PROGRAM) == [
        ("dot", ("bfloat16", "float32")),
        ("__cublas$lt$matmul", ("float16", "float16")),
        ("__cudnn$fmhaSoftmax", ("bfloat16", "bfloat16")),
    ]
    assert custom_calls(PROGRAM) == {"__cublas$lt$matmul", "__cudnn$fmhaSoftmax"}
    assert all_reduced(PROGRAM) == {"f32": 2, "bf16": 410240}
    assert all_reduced(PROGRAM.replace("f32[2]", "pred[2]")) == {"pred": 2, "bf16": 410240}


def test_a_fusion_beside_another_computes_what_is_inside_alone():
    assert_no_dtype(Program(BESIDE), dtype="float32")
    with pytest.raises(AssertionError, match="found 1 of 1 operations") as caught:
        assert_no_dtype(Program(BESIDE), dtype="bfloat16")
    assert "add  bfloat16[16,32]" in str(caught.value)


def test_a_call_beside_another_is_entered():
    call = PROGRAM.replace(
        "fusion(%bitcast.61.0), kind=kLoop, calls=", "call(%bitcast.61.0), to_apply="
    )
    start = call.replace(" call(", " call-start(")
    assert " call(" in call and " call-start(" in start
    assert products(call) == products(start) == products(PROGRAM)


def test_layouts_tuples_and_narrow_formats_are_read():
    by_name = {op.name: op for op in hlo_operations(OTHERS)}
    convolution = by_name["convolution"]
    assert convolution.operands == (
        ArrayType("bfloat16", (8, 128)), ArrayType("float8_e4m3fn", (128, 128))
    )  # fmt: skip
    assert convolution.results == (ArrayType("bfloat16", (8, 128)),)
    assert by_name["dot"].algorithm == "tf32"


class Program(jax.stages.Compiled):
    """A compiled program of which there is the text alone."""

    def __init__(self, text):
        self._text = text

    def as_text(self):
        return self._text


def test_products_of_libraries_are_checked_and_solvers_are_not():
    with pytest.raises(AssertionError, match="found 3 of 3 in another dtype") as caught:
        assert_contractions_in(Program(OTHERS), dtype="float16")
    assert "tf32" in str(caught.value) and "triangular" not in str(caught.value)
    with pytest.raises(AssertionError, match="found 2 of 3") as caught:
        assert_contractions_in(Program(PROGRAM))
    assert "__cublas$lt$matmul  float16[1024,128], float16[128,384] -> float16" in str(caught.value)


@pytest.mark.parametrize(
    "construct", ["plain", "scan", "cond", "remat", "custom_jvp", "custom_vjp"]
)
def test_a_lowered_program_has_the_dtypes_of_the_code(construct):
    fn = CONSTRUCTS[construct]
    assert_contractions_in(jax.jit(jt.autocast(fn)).lower(W, X))
    lowered = jax.jit(jax.grad(fn)).lower(W, X)
    assert_contractions_in(lowered, dtype="float32")
    with pytest.raises(AssertionError, match="helpers/constructs.py:") as caught:
        assert_contractions_in(lowered)
    count = lowered.as_text().count("stablehlo.dot_general")
    assert f"found {count} of {count} in another dtype" in str(caught.value)


@pytest.mark.parametrize("construct", ["plain", "scan", "cond", "custom_vjp"])
def test_a_compiled_program_has_the_dtypes_of_the_device(construct):
    compiled = jax.jit(CONSTRUCTS[construct]).lower(W, X).compile()
    assert_contractions_in(compiled, dtype="float32")
    with pytest.raises(AssertionError, match="every contraction in float16"):
        assert_contractions_in(compiled, dtype="float16")


def test_a_line_of_a_compiled_program_has_module_and_source():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(2, name="head")(x)  # the product

    net = Net()
    step = jax.jit(jax.grad(lambda p, x: jnp.sin(net.apply(p, x)).sum()))
    lowered = step.lower(jax.eval_shape(net.init, jax.random.key(0), X), X)
    with open(__file__, encoding="utf8") as file:
        line = next(n for n, text in enumerate(file, 1) if text.endswith("# the product\n"))
    for program in (lowered, lowered.compile()):
        with pytest.raises(AssertionError) as caught:
            assert_contractions_in(program)
        rows = str(caught.value).splitlines()[1:]
        assert rows and all("  in Net/head  " in row for row in rows)
        assert all(re.search(rf"at {__file__}:{line} \(.*Net.__call__\)$", row) for row in rows)


def add_pairs(a, b):
    return a[0] + b[0], a[1] + b[1]


def reduce_pairs(x):
    zero = np.zeros((), x.dtype)
    return lax.reduce((x, x * x), (zero, zero), add_pairs, (0,))


@pytest.mark.parametrize("fn", [reduce_pairs, lax.cumlogsumexp])
def test_every_operation_of_a_reduction_is_looked_at_not_its_root(fn):
    assert_reductions_in(jax.jit(fn).lower(X))
    with pytest.raises(AssertionError, match="found 1 of 1 in another dtype"):
        assert_reductions_in(jax.jit(fn).lower(HALF))


def test_a_compiled_sum_that_rounds_to_bfloat16_at_each_step_is_found():
    half = jax.jit(lambda x: lax.reduce_sum(x, axes=(0, 1))).lower(HALF).compile()
    if jax.default_backend() == "cpu":  # it adds in float32, and rounds each sum
        assert re.search(r"ROOT .* convert", half.as_text())
    assert_reductions_in(half, dtype="bfloat16")
    with pytest.raises(AssertionError, match="found 1 of 1 in another dtype"):
        assert_reductions_in(half)
    assert_reductions_in(jax.jit(jnp.sum).lower(HALF).compile())


# As XLA writes a sum of bfloat16 for a CPU, shortened.
ROUNDED = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  %sum = f32[] add(%a, %b)
  %half = bf16[] convert(%sum)
  ROOT %wide = f32[] convert(%half)
}

ENTRY %main (x: f32[4,4]) -> f32[4] {
  %x = f32[4,4]{1,0} parameter(0)
  %zero = f32[] constant(0)
  ROOT %reduce.1 = f32[4]{0} reduce(%x, %zero), dimensions={1}, to_apply=%add
}
"""


def test_the_dtype_that_partial_sums_are_rounded_to_is_shown():
    with pytest.raises(AssertionError, match=r"\n  reduce \(rounds to bfloat16\)  float32\[4,4\]"):
        assert_reductions_in(Program(ROUNDED))


def test_a_lowered_sum_over_an_axis_of_length_one_may_have_any_dtype():
    lowered = jax.jit(lambda x: lax.reduce_sum(x[:, None], axes=(1,))).lower(HALF)
    assert "stablehlo.reduce(" in lowered.as_text()
    assert_reductions_in(lowered)


@pytest.mark.parametrize(
    "fn", [lambda x: x.argmax(), lambda x: x.at[0].apply(lambda v: v * 3), lambda x: jnp.sort(x)]
)
def test_what_adds_no_numbers_up_is_not_a_reduction(fn):
    for program in (jax.jit(fn).lower(HALF), jax.jit(fn).lower(HALF).compile()):
        with pytest.raises(AssertionError, match="found no reduction"):
            assert_reductions_in(program)


REDUCTIONS = {
    "reduce": lambda x: lax.reduce_sum(x, axes=(0,)),
    "reduce-window": lambda x: lax.reduce_window(
        x, np.zeros((), x.dtype), lax.add, (1, 2), (1, 2), "VALID"
    ),
    "scatter": lambda x: x.at[jnp.array([0, 0])].add(x[:2]),
    "select-and-scatter": jax.grad(
        lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 2), (1, 2), "VALID")[0, 0]
    ),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_of_a_lowered_program_are_checked(name):
    loop = lambda x: lax.map(REDUCTIONS[name], x[None])
    assert_reductions_in(jax.jit(loop).lower(X))
    with pytest.raises(
        AssertionError, match=rf"found 1 of 1 in another dtype:\n  {name}  bfloat16"
    ):
        assert_reductions_in(jax.jit(loop).lower(HALF))


def test_a_maximum_is_no_reduction_of_a_program():
    with pytest.raises(AssertionError, match="found no reduction"):
        assert_reductions_in(jax.jit(lambda x: x.max()).lower(X))


@pytest.mark.parametrize("compiled", [False, True], ids=["lowered", "compiled"])
def test_no_dtype_of_a_program_takes_names_of_both_kinds(compiled):
    lowered = jax.jit(lambda x: jnp.exp(x).sum()).lower(X)
    program = lowered.compile() if compiled else lowered
    assert_no_dtype(program, dtype="bfloat16")
    check = functools.partial(assert_no_dtype, program)
    check(except_=["exp", "reduce_sum"])
    check(except_=["exponential", "reduce"])
    with pytest.raises(AssertionError, match="found 1 of 2 operations with it:\n  reduce  float32"):
        check(except_=["exp"])
    with pytest.raises(ValueError, match="'exponentiel' in except_; did you mean 'exponential'"):
        check(except_=["exponentiel"])
