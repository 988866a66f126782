"""Assertions on the dtypes that a program's operations run in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from jmp_train._autocast.op_rules import default_op_rules
from jmp_train._jaxpr.compat import known_primitives
from jmp_train.errors import nearest
from jmp_train.numerics.dtypes import parse_dtype
from jmp_train.testing.hlo import hlo_operations
from jmp_train.testing.operations import (
    Operation,
    Program,
    refuse_arguments,
    report,
    stage_of,
    traced_operations,
)
from jmp_train.types import DTypeLike, PyTree

# Matrix products, convolutions and attention: primitives, HLO operations and libraries' calls.
_CONTRACTION = re.compile(
    r"(dot_general|ragged_dot_general|conv_general_dilated|symmetric_product"
    r"|(bcoo|bcsr)_(spdot_general|dot_general(_sampled)?)|(coo|csr)_mat(vec|mat)"
    r"|scaled_(dot|matmul)\w*|dot_product_attention_\w+"
    r"|dot|ragged-dot|scaled-dot|convolution"
    r"|__cublas\$(?!triangular).*|__cudnn\$(conv|fmha).*|__onednn\$(matmul|conv).*)"
)

#: Primitives that accumulate: a sum or a product of many numbers, whole, cumulative or scattered.
REDUCTIONS = frozenset(
    {
        "cumlogsumexp", "cumprod", "cumsum", "reduce_prod", "reduce_sum", "reduce_window_sum",
        "scatter-add", "scatter-mul", "scatter-sub", "select_and_scatter_add",
    }
)  # fmt: skip
# Those of any function, of JAX and of HLO, and the operations in it that accumulate.
_GENERIC_REDUCTIONS = frozenset(
    {
        "reduce", "reduce_window", "select_and_scatter",
        "reduce-window", "scatter", "select-and-scatter",
    }
)  # fmt: skip
_ACCUMULATING = frozenset({"add", "add_any", "mul", "multiply", "sub", "subtract"})

#: What only converts, names or moves arrays of a compiled program.
_NOT_COMPUTED = frozenset(
    {
        "convert_element_type", "convert", "parameter", "constant", "tuple", "get-tuple-element",
        "bitcast", "copy", "copy-start", "copy-done", "fusion", "fusion-start", "fusion-done", "call",
        "call-start", "call-done", "async-start", "async-update", "async-done", "while", "conditional",
    }
)  # fmt: skip


def assert_contractions_in(fn: Program, *args: PyTree, dtype: DTypeLike = "bfloat16") -> None:
    """Assert that every matrix product and convolution of floating numbers runs in a dtype.

    Of a function, the program is what JAX traces, so the dtypes are those that the code asks for,
    whatever the device. Loops, branches, `jit`, `remat`, the functions of custom derivatives, Pallas
    kernels and functions of `jax.export` are entered; one that was exported for several platforms can
    have an operation once for each. Derivative rules are in the program of the derivative, so pass
    `jax.grad(loss)` to check them; the line of an operation in a rule may be that of the call.

    Of a compiled program, the dtypes are those that the device multiplies in. XLA converts float16
    and bfloat16 to float32 on most CPUs. Calls of cuBLAS, cuDNN and oneDNN are products too; the
    kernels of other custom calls cannot be read.

    A product runs in the dtypes of its two operands; the dtype that it accumulates in may be wider.
    Products of `jax.experimental.sparse` are found in a traced program; lowered, they are sums.
    A `jax.lax.DotAlgorithmPreset` or `DotAlgorithm` replaces them.

    Args:
      fn: a function, jitted or not; or what `trace`, `lower` and `compile` of `jax.jit`, `nnx.jit` or
        `eqx.filter_jit` return.
      *args: arguments of the function, arrays or `jax.ShapeDtypeStruct`s in pytrees; other leaves,
        such as functions, reach it as they are. None for a traced, lowered or compiled program.
      dtype: a floating dtype or its name.

    Raises:
      AssertionError: if a contraction runs in another dtype, with a line for each of the first ten,
        and if the program has no contractions.
      TypeError: if `fn` is neither a function nor a program.
      ValueError: for an unknown dtype, and for arguments of a compiled program.

    >>> import jax.numpy as jnp
    >>> x = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    >>> assert_contractions_in(lambda x: x.astype(jnp.bfloat16) @ x.astype(jnp.bfloat16), x)
    >>> assert_contractions_in(lambda x: x @ x, x, dtype="float32")
    """
    expected = parse_dtype(dtype).name
    _assert_each(
        "assert_contractions_in",
        [op for op in _operations(fn, args) if _is_contraction(op)],
        lambda op: _multiplied_in(op) <= {expected},
        "contraction",
        expected,
    )


def assert_reductions_in(fn: Program, *args: PyTree, dtype: DTypeLike = "float32") -> None:
    """Assert that every sum and product of many floating numbers is accumulated in a dtype.

    These are `reduce_sum`, `reduce_prod`, `cumsum`, `cumprod`, `cumlogsumexp`, `reduce_window_sum`,
    `scatter-add`, `-sub` and `-mul` (the gradient of an embedding), `select_and_scatter_add` (that of
    max pooling), and `lax.reduce` and `reduce_window` of a function that adds or multiplies. Where
    that function converts, as XLA's does on a CPU, the coarsest of its dtypes counts, to which every
    partial result is rounded. A maximum is exact in any dtype and is not checked. A sum over axes of
    length 1 may have any dtype. Sums between devices (`psum`) are not checked, because their dtype is
    often chosen to be narrow, and neither are products, which accumulate in float32 on most devices;
    see `assert_contractions_in`. A loop that adds to its carry has no reduction, and
    neither has `jax.lax.associative_scan`; `assert_close_to_float64` finds the errors of their sums.

    Args:
      fn, *args: as for `assert_contractions_in`.
      dtype: a floating dtype or its name.

    Raises:
      AssertionError: if a reduction runs in another dtype, and if there is none.
      TypeError, ValueError: as `assert_contractions_in`.

    >>> import jax.numpy as jnp
    >>> half = jnp.ones(4, jnp.bfloat16)
    >>> assert_reductions_in(jnp.sum, half)  # jnp.sum casts to float32, adds, and casts back
    """
    expected = parse_dtype(dtype).name
    _assert_each(
        "assert_reductions_in",
        [op for op in _operations(fn, args) if _is_reduction(op)],
        lambda op: op.accumulated <= {expected} or _is_of_one_number(op),
        "reduction",
        expected,
    )


def assert_no_dtype(
    fn: Program,
    *args: PyTree,
    dtype: DTypeLike = "float32",
    except_: Iterable[str] = (),
    only: Iterable[str] = (),
) -> None:
    """Assert that no operation of a program, or none of some, reads or returns a dtype.

    Casts are not counted, so parameters may be stored in float32 and cast where they are used.

    Args:
      fn, *args: as for `assert_contractions_in`.
      dtype: the floating dtype that is not expected, or its name.
      except_: names of the operations that may have it, as a printed jaxpr shows them (`"exp"`,
        `"reduce_sum"`). Of a lowered or compiled program, HLO names (`"exponential"`) match too, and
        names of operations that JAX decomposes (`"cumsum"`, `"logistic"`) match nothing.
      only: names of the operations to check, each of which must occur with floating numbers; none to
        check all.

    Raises:
      AssertionError: if an operation has the dtype, if there is none to check, and if a name of `only`
        does not occur.
      ValueError: for an unknown name, with the nearest.
      TypeError, ValueError: as `assert_contractions_in`.

    >>> import jax.numpy as jnp
    >>> half = jnp.ones(4, jnp.bfloat16)
    >>> assert_no_dtype(lambda x: jnp.sum(x * x), half, except_=["reduce_sum"])
    >>> assert_no_dtype(lambda x: jax.nn.gelu(x).sum(), half, dtype="bfloat16", only=["reduce_sum"])
    """
    unexpected = parse_dtype(dtype).name
    operations = [op for op in _operations(fn, args) if op.name not in _NOT_COMPUTED]
    excepted = _parse_names(except_, operations, "except_")
    checked = _parse_names(only, operations, "only")
    floating = [
        op
        for op in operations
        if _read(op) | _written(op) and (not checked or checked & {op.name, op.primitive})
    ]
    absent = checked - {name for op in floating for name in (op.name, op.primitive)}
    if absent or not floating:
        named = " and no ".join(f"{name} of floating numbers" for name in sorted(absent))
        raise _nothing("assert_no_dtype", named if absent else "operation on floating numbers")
    found = [
        op
        for op in floating
        if unexpected in _read(op) | _written(op) and not excepted & {op.name, op.primitive}
    ]
    if found:
        but = f" in {', '.join(sorted(checked))}" if checked else ""
        but += f" but in {', '.join(sorted(excepted))}" if excepted else ""
        some = f"{len(found)} of {len(floating)} operations with it"
        raise report("assert_no_dtype", f"no {unexpected}{but}", some, found)


def _operations(program: Program, args: Sequence[PyTree]) -> list[Operation]:
    stage = stage_of(program)
    if isinstance(stage, (jax.stages.Lowered, jax.stages.Compiled)):
        refuse_arguments(args)
        return hlo_operations(_text(stage))
    operations = traced_operations(program, args)
    return [found for op in operations for found in (_exported(op) if op.exported else [op])]


def _exported(op: Operation) -> list[Operation]:
    """Return the operations of the exported function that an operation calls; JAX has no jaxpr of it.

    One of several devices, or whose program depends on the symbols of its shapes, is one operation.
    """
    function = op.exported
    if function.nr_devices > 1:
        return [op]
    arrays = zip(
        op.operands, function.in_avals, strict=True
    )  # shapes of `in_avals` may have symbols
    leaves = [jax.ShapeDtypeStruct(given.shape, aval.dtype) for given, aval in arrays]
    args, kwargs = jax.tree.unflatten(function.in_tree, leaves)
    traced = jax.jit(function.call).trace(*args, **kwargs)
    lowered = traced.lower(lowering_platforms=function.platforms)
    try:
        text = _text(lowered)
    except jax.errors.JaxRuntimeError:  # HLO has no broadcast to a length that is a symbol
        return [op]
    path = "/".join(filter(None, (op.path, f"{op.name}:{function.fun_name}")))
    return [
        found._replace(
            path=path, module=found.module or op.module, source=found.source or op.source
        )
        for found in hlo_operations(text)
    ]


def _text(program: jax.stages.Lowered | jax.stages.Compiled) -> str:
    if isinstance(program, jax.stages.Compiled):
        return program.as_text() or ""
    hlo: Any = program.compiler_ir("hlo")
    return hlo.as_hlo_module().to_string()  # `as_text` leaves out where operations were written


def _is_contraction(op: Operation) -> bool:
    return bool(_CONTRACTION.fullmatch(op.name) and _multiplied_in(op))


def _is_reduction(op: Operation) -> bool:
    applies_once = op.primitive == "scatter"  # `x.at[i].apply` and `set`
    accumulates = op.name in REDUCTIONS or (
        op.name in _GENERIC_REDUCTIONS and bool(op.combines & _ACCUMULATING) and not applies_once
    )
    return accumulates and bool(_read(op))


def _is_of_one_number(op: Operation) -> bool:
    """Return whether each sum is over axes of length 1, as in the gradient of `x[:, None]`."""
    if op.name not in ("reduce", "reduce_prod", "reduce_sum"):
        return False
    read, written = ([n for n in x.shape if n != 1] for x in (op.operands[0], op.results[0]))
    return read == written


def _multiplied_in(op: Operation) -> set[str]:
    if op.algorithm:
        return {op.algorithm}
    return {x.dtype for x in op.operands[:2] if x.is_floating}


def _read(op: Operation) -> set[str]:
    return {x.dtype for x in op.operands if x.is_floating}


def _written(op: Operation) -> set[str]:
    return {x.dtype for x in op.results if x.is_floating}


def _assert_each(
    assertion: str,
    operations: Sequence[Operation],
    runs: Callable[[Operation], bool],
    kind: str,
    expected: str,
) -> None:
    """Raise an AssertionError for an empty list, or an operation that does not run as expected."""
    if not operations:
        raise _nothing(assertion, kind)
    others = [op for op in operations if not runs(op)]
    if others:
        found = f"{len(others)} of {len(operations)} in another dtype"
        raise report(assertion, f"every {kind} in {expected}", found, others)


def _nothing(assertion: str, kind: str) -> AssertionError:
    return AssertionError(f"{assertion} failed: found no {kind} to check in the program")


def _parse_names(names: Iterable[str], operations: Sequence[Operation], argument: str) -> set[str]:
    """Return the names, each of which a primitive of JAX or an operation of the program has."""
    names = {names} if isinstance(names, str) else set(names)
    valid = known_primitives() | {n for op in operations for n in (op.name, op.primitive) if n}
    valid |= default_op_rules.float32 | default_op_rules.promote
    for name in sorted(names - valid):
        raise ValueError(
            f"unknown operation {name!r} in {argument}; {nearest(name, sorted(valid))}"
        )
    return names
