"""Operations of a traced or a compiled program: what each reads, returns and was written as."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jmp_train._autocast.regions import module_path
from jmp_train._jaxpr.compat import Equation
from jmp_train._jaxpr.equations import Place, has_bodies, placed_equations
from jmp_train._jaxpr.source import calling_classes, user_line
from jmp_train.types import PyTree

#: A function, or a program that JAX lowered or compiled.
Program = Any

SHOWN = 10


class ArrayType(NamedTuple):
    """Dtype and shape of an operand or a result."""

    dtype: str
    shape: tuple[int, ...]

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
      combines: names of what a reduction accumulates with: `"add"`, `"multiply"`.
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
    module: str = ""
    path: str = ""
    source: str = ""

    def __str__(self) -> str:
        algorithm = f" (computes in {self.algorithm})" if self.algorithm else ""
        read, written = (", ".join(map(str, x)) for x in (self.operands, self.results))
        where = [f"in {self.module}"] * bool(self.module)
        where += [f"inside {self.path}"] * bool(self.path)
        where += [f"at {self.source}"] * bool(self.source)
        return "  ".join([f"{self.name}{algorithm}", f"{read} -> {written}", *where])


def trace(fn: Any, args: Sequence[PyTree]) -> Any:
    """Return the jaxpr of a function, jitted or not, of arrays or `jax.ShapeDtypeStruct`s."""
    if not callable(fn):
        raise TypeError(f"expected a function or a compiled program, got {type(fn).__name__}")
    # A new function each time: JAX would reuse the trace of an equal one, and needs a hash.
    jitted: Any = fn if hasattr(fn, "trace") else jax.jit(lambda *args: fn(*args))
    return jitted.trace(*args).jaxpr


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
    return Operation(
        name=eqn.primitive.name,
        operands=_types(eqn.invars),
        results=_types(eqn.outvars),
        primitive=eqn.primitive.name,
        algorithm=_algorithm(eqn.params.get("precision")),
        module=module_path(place.stack_of(eqn)) or calling_classes(eqn),
        path="/".join(place.path),
        source=user_line(eqn),
    )


def _types(atoms: Sequence[Any]) -> tuple[ArrayType, ...]:
    avals = [atom.aval for atom in atoms if hasattr(atom.aval, "dtype")]
    return tuple(ArrayType(str(aval.dtype), tuple(aval.shape)) for aval in avals)


def _algorithm(precision: Any) -> str:
    is_preset = isinstance(precision, jax.lax.DotAlgorithmPreset)
    return algorithm_dtype(precision.name) if is_preset else ""


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
