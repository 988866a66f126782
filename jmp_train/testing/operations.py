"""Operations of a traced or a compiled program: what each reads, returns and was written as."""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jmp_train._autocast.regions import module_path
from jmp_train._jaxpr.compat import Equation, exported_of
from jmp_train._jaxpr.equations import Place, has_bodies, placed_equations
from jmp_train._jaxpr.source import calling_classes, user_line
from jmp_train.types import Function, PyTree

#: A function, or a program that JAX traced, lowered or compiled, of Flax's and Equinox's `jit` too.
Program = Any

_STAGES = (jax.stages.Traced, jax.stages.Lowered, jax.stages.Compiled)

SHOWN = 10

# Primitives that accumulate with a function of the user's, and the parameter that contains it.
_COMBINERS = {"reduce": "jaxpr", "reduce_window": "jaxpr", "select_and_scatter": "scatter_jaxpr"}


class ArrayType(NamedTuple):
    """Dtype and shape of an operand or a result; a length that varies is a text, such as `"?"`."""

    dtype: str
    shape: tuple[int | str, ...]

    @property
    def is_floating(self) -> bool:
        return self.dtype.startswith(("float", "bfloat"))

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


class Operation(NamedTuple):
    """One operation of a program.

    Attributes:
      name: of the primitive; in a compiled program of the HLO operation or the custom call.
      operands, results: types of its arrays.
      primitive: name of the primitive that it was traced from; `""` where a compiled program does
        not tell.
      algorithm: dtype that a product computes in whatever its operands are, `""` for none.
      combines: names of the floating operations that a reduction accumulates with: `"add"`.
      combined: dtypes of their results.
      exported: the function of `jax.export` that it calls, None for none.
      module: path of the module, as the name stack or, for NNX, the calls tell it.
      path: the bodies that contain it, such as `"jit:step/scan"`.
      source: file, line and function.
    """

    name: str
    operands: tuple[ArrayType, ...] = ()
    results: tuple[ArrayType, ...] = ()
    primitive: str = ""
    algorithm: str = ""
    combines: frozenset[str] = frozenset()
    combined: frozenset[str] = frozenset()
    module: str = ""
    path: str = ""
    source: str = ""
    exported: Any = None

    @property
    def accumulated(self) -> set[str]:
        """Dtypes that a reduction accumulates in.

        Where the function that it applies converts, this is the coarsest of its dtypes, to which every
        partial result is rounded.
        """
        dtypes = self.combined | {x.dtype for x in self.operands if x.is_floating}
        if self.combines & {"convert", "convert_element_type"}:
            return {max(dtypes, key=lambda name: float(jnp.finfo(name).eps))}
        return set(dtypes)

    def __str__(self) -> str:
        algorithm = f" (computes in {self.algorithm})" if self.algorithm else ""
        rounded = sorted(self.accumulated - {x.dtype for x in self.operands})
        algorithm += f" (rounds to {' and '.join(rounded)})" if rounded else ""
        read, written = (", ".join(map(str, x)) for x in (self.operands, self.results))
        where = [f"in {self.module}"] * bool(self.module)
        where += [f"inside {self.path}"] * bool(self.path)
        where += [f"at {self.source}"] * bool(self.source)
        return "  ".join([f"{self.name}{algorithm}", f"{read} -> {written}", *where])


def stage_of(program: Program) -> Any:
    """Return the program that JAX traced, lowered or compiled; None for a function.

    `nnx.jit` and `eqx.filter_jit` return it inside an object of their own.
    """
    if isinstance(program, _STAGES):
        return program
    inner = [getattr(program, name, None) for name in ("traced", "lowered", "compiled")]
    return next((stage for stage in inner if isinstance(stage, _STAGES)), None)


def trace(fn: Program, args: Sequence[PyTree]) -> Any:
    """Return the jaxpr of a function, jitted or not, of arrays or `jax.ShapeDtypeStruct`s.

    Of the arguments of a function that is not jitted, arrays and Python's `int`, `float` and `complex`
    are traced, as `jax.jit` does; other leaves, such as the functions and flags of an Equinox module,
    reach it as they are.

    Raises:
      TypeError: for neither a function nor a traced program.
      ValueError: for arguments of a traced program.
    """
    stage = stage_of(fn)
    if isinstance(stage, jax.stages.Traced):
        refuse_arguments(args)
        return stage.jaxpr
    if stage is not None:
        raise TypeError(f"expected a function or a traced program, got {type(fn).__name__}")
    fn, args = _unbound(fn, args)
    jitted, args = (fn, args) if isinstance(fn, jax.stages.Wrapped) else jit(fn, args)
    return stage_of(jitted.trace(*args)).jaxpr


def lower(fn: Function, args: Sequence[PyTree]) -> jax.stages.Lowered:
    """Return the lowered program of a function, jitted or not, with its static and donated arguments."""
    fn, args = _unbound(fn, args)
    is_jitted = isinstance(fn, jax.stages.Wrapped)
    jitted: Any = fn
    if _is_of_equinox(fn):  # it lowers for arrays alone
        is_jitted = not any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(args))
    if not is_jitted:
        jitted, args = jit(fn, args)
    return stage_of(jitted.lower(*args))


def _unbound(fn: Program, args: Sequence[PyTree]) -> tuple[Program, Sequence[PyTree]]:
    """Return the jitted function that a bound method calls, and the arguments with `self`.

    Python gives the method of `jax.jit` the attributes `trace` and `lower` of the function, which
    know no `self`; the method of `nnx.jit` is a `functools.partial`. The method of an object that is
    called, such as a module, is its `__call__`.
    """
    is_method = isinstance(fn, (types.MethodType, functools.partial, jax.stages.Wrapped))
    method = fn if is_method else getattr(fn, "__call__", fn)  # noqa: B004
    inner, bound = method, ()
    if isinstance(method, types.MethodType):
        inner, bound = method.__func__, (method.__self__,)
    elif isinstance(method, functools.partial) and not method.keywords:
        inner, bound = method.func, method.args
    return (inner, (*bound, *args)) if isinstance(inner, jax.stages.Wrapped) else (fn, args)


def jit(fn: Function, args: Sequence[PyTree]) -> tuple[Any, list[Any]]:
    """Return a jitted function of the leaves that are traced, and these leaves."""
    if not callable(fn):
        raise TypeError(f"expected a function or a compiled program, got {type(fn).__name__}")
    leaves, tree = jax.tree.flatten(tuple(args))
    # `eqx.filter_jit` traces arrays alone.
    numbers = () if _is_of_equinox(fn) else (int, float, complex)
    where = [i for i, x in enumerate(leaves) if type(x) in numbers or _is_array(x)]

    # A new function each time: JAX would reuse the trace of an equal one, and needs a hash.
    def of_arrays(*arrays: Any) -> Any:
        full = list(leaves)
        for i, array in zip(where, arrays, strict=True):
            full[i] = array
        out = jax.tree.leaves(fn(*jax.tree.unflatten(tree, full)))
        return [x for x in out if _is_array(x) or isinstance(x, (int, float, complex))]

    return jax.jit(of_arrays), [leaves[i] for i in where]


def refuse_arguments(args: Sequence[PyTree]) -> None:
    """Raise a ValueError for arguments beside a program that has its own."""
    if args:
        raise ValueError(
            "a traced, lowered or compiled program has its arguments; "
            f"expected none, got {len(args)}"
        )


def _is_of_equinox(fn: Function) -> bool:
    return type(fn).__module__.startswith("equinox.") and hasattr(fn, "lower")


def _is_array(x: Any) -> bool:
    if isinstance(x, (np.ndarray, np.generic)):
        return x.dtype.kind not in "OSUMm"  # objects, texts and dates
    is_class = isinstance(x, type)  # `np.float32` has the attributes too
    return not is_class and (
        (hasattr(x, "shape") and hasattr(x, "dtype")) or hasattr(x, "__jax_array__")
    )


def traced_operations(fn: Any, args: Sequence[PyTree]) -> list[Operation]:
    """Return the operations of a function as JAX traces it, without those that only have bodies."""
    placed = placed_equations(trace(fn, args))
    return [_operation(eqn, place) for eqn, place in placed if not has_bodies(eqn)]


def report(assertion: str, expected: str, found: str, items: Sequence[object]) -> AssertionError:
    """Return the error of an assertion, with a line for each of the first items."""
    lines = [f"{assertion} failed: expected {expected}, found {found}:"]
    lines += [f"  {item}" for item in items[:SHOWN]]
    lines += [f"  and {len(items) - SHOWN} more"] * (len(items) > SHOWN)
    return AssertionError("\n".join(lines))


def _operation(eqn: Equation, place: Place) -> Operation:
    combiner = _combiner(eqn)
    return Operation(
        name=eqn.primitive.name,
        operands=_types(eqn.invars),
        results=_types(eqn.outvars),
        primitive=eqn.primitive.name,
        algorithm=_algorithm(eqn.params.get("precision")),
        combines=frozenset(name for name, _ in combiner),
        combined=frozenset(dtype for _, dtype in combiner),
        module=module_path(place.stack_of(eqn)) or calling_classes(eqn, place.callers),
        path="/".join(place.path),
        source=user_line(eqn, place.callers),
        exported=exported_of(eqn),
    )


def _types(atoms: Sequence[Any]) -> tuple[ArrayType, ...]:
    avals = [atom.aval for atom in atoms if hasattr(atom.aval, "dtype")]
    return tuple(ArrayType(str(aval.dtype), tuple(aval.shape)) for aval in avals)


def _combiner(eqn: Equation) -> set[tuple[str, str]]:
    """Return names and dtypes of the floating operations that a reduction of any function applies."""
    body = eqn.params.get(_COMBINERS.get(eqn.primitive.name, ""))
    inner = placed_equations(body) if body is not None else ()
    return {
        (e.primitive.name, t.dtype) for e, _ in inner for t in _types(e.outvars) if t.is_floating
    }


def _algorithm(precision: Any) -> str:
    if isinstance(precision, jax.lax.DotAlgorithmPreset):
        return algorithm_dtype(precision.name)
    if isinstance(precision, jax.lax.DotAlgorithm) and precision.num_primitive_operations == 1:
        types = (precision.lhs_precision_type, precision.rhs_precision_type)
        return " and ".join(dict.fromkeys(jnp.dtype(dtype).name for dtype in types))
    return ""


def algorithm_dtype(name: str) -> str:
    """Return the dtype to which an algorithm such as `"BF16_BF16_F32"` rounds its operands.

    Algorithms of several products, such as `"BF16_BF16_F32_X3"`, are nearly as exact as the
    operands' own dtype.
    """
    first, *rest = name.lower().split("_")
    names = {
        "bf16": "bfloat16",
        "f16": "float16",
        "tf32": "tf32",
        "f32": "float32",
        "f64": "float64",
    }
    return "" if rest and rest[-1].startswith("x") else names.get(first, "")
