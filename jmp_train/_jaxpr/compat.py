"""Reads and binds equations beyond the public API of JAX, in one place.

Everything here reads equations that JAX itself wrote: how a primitive is bound again, and how the
rules that a user gave to `custom_jvp` and `custom_vjp` are stored in an equation's parameters. The
layouts are those of JAX 0.10 to 0.12; any other layout raises `JaxLayoutError`, which names the
installed version, so that a change in JAX is never a silent change in precision.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import numpy as np
from jax.core import ShapedArray, Tracer, eval_jaxpr
from jax.custom_derivatives import SymbolicZero
from jax.extend import core as jex_core
from jax.extend import source_info_util

from jmp_train.types import Function

# JAX 0.10 and 0.11 keep these in different classes, and publish not all of them.
Equation = Any
Jaxpr = Any
Atom = Any
AbstractValue = Any
Primitive = Any
# An array or a tracer; in a walk, what the walk keeps for it.
Operand = Any

OLDEST = (0, 10)


class JaxLayoutError(RuntimeError):
    """The installed JAX stores a derivative rule in a layout that `autocast` does not know."""

    def __init__(self, what: str):
        super().__init__(
            f"autocast does not know {what} in jax {jax.__version__}; it is written for jax 0.10 "
            "to 0.12. Install one of these, or wrap the code in with_precision('float32')"
        )


if jax.__version_info__[:2] < OLDEST:
    raise ImportError(f"jmp_train needs jax 0.10 or later, found {jax.__version__}")


class Body(NamedTuple):
    """A jaxpr and the values of its constants; JAX 0.10 has two classes for this, 0.11 one."""

    jaxpr: Jaxpr
    consts: Sequence[Operand]

    @property
    def all_invars(self) -> Sequence[Operand]:
        """Constants, then inputs. JAX 0.11 has them in one list, 0.10 in two."""
        both = getattr(self.jaxpr, "all_invars", None)
        return (*self.jaxpr.constvars, *self.jaxpr.invars) if both is None else both

    @property
    def constvars(self) -> Sequence[Operand]:
        return self.all_invars[: len(self.consts)]

    @property
    def invars(self) -> Sequence[Operand]:
        return self.all_invars[len(self.consts) :]

    @property
    def outvars(self) -> Sequence[Operand]:
        return self.jaxpr.outvars

    @property
    def eqns(self) -> Sequence[Operand]:
        return self.jaxpr.eqns

    def is_constant(self, atom: Atom) -> bool:
        """Return whether an atom is a literal or a constant, known before anything runs."""
        return isinstance(atom, jex_core.Literal) or any(atom is v for v in self.constvars)


def body_of(jaxpr: Jaxpr) -> Body:
    """Return the body of an open or a closed jaxpr."""
    return Body(getattr(jaxpr, "jaxpr", jaxpr), tuple(getattr(jaxpr, "consts", ())))


def called_body(eqn: Equation) -> Body:
    """Return the body that an equation runs once on all its operands.

    Raises:
      JaxLayoutError: if its parameters have none.
    """
    for name in ("jaxpr", "call_jaxpr", "call", "callee"):  # "jaxpr" of composite: up to JAX 0.10
        if name in eqn.params:
            return body_of(eqn.params[name])
    raise JaxLayoutError(f"the body of {eqn.primitive.name}")


def trace(fun: Function, avals: Sequence[Operand], name: str = "") -> Any:
    """Return the closed jaxpr of a function of flat arrays; `avals` have shardings and axes."""
    if name:
        fun.__name__ = fun.__qualname__ = name
    return jax.make_jaxpr(fun)(*avals)


def open_jaxpr(closed: Any) -> tuple[Any, Sequence[Operand]]:
    """Return a jaxpr without constants, and the values that it now takes first."""
    body = body_of(closed)
    if not body.consts:
        return body.jaxpr, ()

    def with_consts(*args: Any) -> Any:
        split = len(body.consts)
        return eval_jaxpr(body.jaxpr, args[:split], *args[split:])

    avals = [v.aval for v in (*body.constvars, *body.invars)]
    return body_of(trace(with_consts, avals)).jaxpr, body.consts


def aval_like(aval: AbstractValue, dtype: Any) -> Any:
    """Return the same array type with another dtype, strongly typed."""
    return aval.update(dtype=dtype, weak_type=False)


def bind(primitive: Primitive, args: Sequence[Operand], params: dict[str, Any]) -> list[Operand]:
    """Apply a primitive with the parameters of one of its equations."""
    out = primitive.bind(*args, **primitive.get_bind_params(params))
    return list(out) if primitive.multiple_results else [out]


@contextlib.contextmanager
def context_of(eqn: Equation, *, line: bool = True) -> Iterator[None]:
    """Re-emit under the name stack, source line and settings that an equation was written in.

    Without `line`, under the lines of the code that runs.
    """
    info = eqn.source_info
    stack = source_info_util.current_name_stack() + info.name_stack
    settings = getattr(getattr(eqn, "ctx", None), "manager", contextlib.nullcontext())
    traceback = info.traceback if line else None
    with source_info_util.user_context(traceback, name_stack=stack), settings:
        yield


def is_staged_array(x: Operand) -> bool:
    """Return whether an array is one of a program that is being traced, and has no value yet."""
    if not isinstance(x, Tracer) or not isinstance(jax.typeof(x), ShapedArray):
        return False
    inside = x
    while isinstance(inside, Tracer):  # of a derivative, then of a `vmap`
        inside = getattr(inside, "primal", getattr(inside, "val", None))
    return not isinstance(inside, (jax.Array, np.ndarray, np.generic, int, float, complex))


def function_name(jaxpr: Jaxpr) -> str:
    """Return the name of the function that a jaxpr was traced from, '' where JAX stores none."""
    info = getattr(body_of(jaxpr).jaxpr, "debug_info", None)
    return str(getattr(info, "func_name", "") or "").split(" ")[0]


def is_called_by_jax_random(eqn: Equation) -> bool:
    """Return whether the code of `jax.random` called the function of an equation."""
    files = (frame.file_name for frame in getattr(eqn.source_info.traceback, "frames", ()))
    callers = (file for file in files if file == _SAMPLERS or not file.startswith(_JAX))
    return next(callers, None) == _SAMPLERS


_JAX = os.path.join(os.path.dirname(jax.__file__), "")
_SAMPLERS = inspect.unwrap(jax.random.normal).__code__.co_filename


def is_symbolic_zero(x: Operand) -> bool:
    """Return whether a (co)tangent is a symbolic zero, which has no array."""
    return isinstance(x, SymbolicZero) or type(x).__name__ == "Zero"


def _call(fun: Any, *args: Any) -> Any:
    return getattr(fun, "call_wrapped", fun)(*args)


def jvp_rule(params: dict[str, Any], zeros: Sequence[bool]) -> tuple[Body, Sequence[bool]]:
    """Return a `custom_jvp` rule as a body: `(primals, non-zero tangents) -> (primals, tangents)`.

    Args:
      params: those of a `custom_jvp_call` equation.
      zeros: which tangents, constants left out, are symbolic zeros.

    Returns:
      The body, and which of the output tangents are zero and left out of its outputs.
    """
    try:
        jaxpr, consts, out_zeros = _call(params["jvp_jaxpr_fun"], *zeros)
    except (KeyError, TypeError, ValueError) as error:
        raise JaxLayoutError("the rule of a custom_jvp") from error
    return Body(getattr(jaxpr, "jaxpr", jaxpr), tuple(consts)), out_zeros


class VjpRule(NamedTuple):
    """A `custom_vjp` rule, flat: `forward` returns the residuals that are not inputs, then the
    outputs; `inputs[i]` is the operand that residual i is, None where `forward` returns it."""

    forward: Body
    inputs: Sequence[int | None]


def vjp_rule(params: dict[str, Any], nonzeros: Sequence[bool]) -> VjpRule:
    """Return the forward rule of a `custom_vjp_call` equation, for perturbed inputs `nonzeros`."""
    try:
        jaxpr, consts = _call(params["fwd_jaxpr_thunk"], *nonzeros)
        _, _, inputs = params["out_trees"]()
    except (KeyError, TypeError, ValueError) as error:
        raise JaxLayoutError("the rule of a custom_vjp") from error
    return VjpRule(Body(getattr(jaxpr, "jaxpr", jaxpr), tuple(consts)), inputs)


def run_backward(
    params: dict[str, Any], residuals_and_cotangents: Sequence[Operand]
) -> tuple[list[Operand], dict[str, Any] | None]:
    """Return the cotangents that a `custom_vjp` rule gives for its operands, and its logs.

    Constants are left out. JAX 0.10 returns the cotangents alone, 0.11 both.
    """
    out = _call(params["bwd"], *residuals_and_cotangents)
    if len(out) == 2 and isinstance(out[0], (list, tuple)):  # a cotangent is never one
        return list(out[0]), out[1]
    return list(out), None


def define_vjp(function: Any, forward: Function, backward: Function, symbolic_zeros: bool) -> None:
    """Give a `custom_vjp` its rules; `backward` returns `(cotangents, logs)`."""
    if hasattr(function, "defvjp_with_logs"):
        function.defvjp_with_logs(forward, backward, symbolic_zeros=symbolic_zeros)
    else:
        function.defvjp(forward, lambda *args: backward(*args)[0], symbolic_zeros=symbolic_zeros)


def exported_of(eqn: Equation) -> Any:
    """Return the function of `jax.export` that an equation calls, None for none."""
    return next((p for p in eqn.params.values() if isinstance(p, jax.export.Exported)), None)


def known_primitives() -> frozenset[str]:
    """Return the names of the primitives that JAX publishes in `jax.extend.core.primitives`."""
    primitives = vars(jex_core.primitives).values()
    return frozenset(p.name for p in primitives if isinstance(p, jex_core.Primitive))


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """Return how many constants and carries a scan has: plain in jax 0.10, a tree's in 0.11."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = map(list, params["ft_in"].unpack())
    return len(consts), len(carry)


def with_scan_consts(params: dict[str, Any], count: int) -> dict[str, Any]:
    """Return a scan's parameters with another number of constants."""
    if "num_consts" in params:
        return {**params, "num_consts": count}
    # The trees of jax 0.11 have no public constructor; use the one in their own module.
    trees = importlib.import_module(type(params["ft_in"]).__module__)
    _, carry, xs = params["ft_in"].unpack()
    return {**params, "ft_in": trees.pack((trees.nones(count), carry, xs))}
