"""The primitives that have bodies: one table for everything that walks a jaxpr.

A primitive has another name in another version of JAX (`jit` and `pjit`; `remat`, `remat2` and
`checkpoint`), so the table gives each name its construct, and code asks for the construct.
"""

from __future__ import annotations

from typing import NamedTuple

from jmp_train._jaxpr import compat
from jmp_train._jaxpr.compat import Equation, Operand


class Construct(NamedTuple):
    """How a primitive evaluates its bodies.

    Attributes:
      name: `"jit"`, `"remat"`, `"call"`, `"custom_jvp"`, `"custom_vjp"`, `"shard_map"`, `"cond"`,
        `"while"` or `"scan"`, for every name of the primitive.
      parameters: the parameters that contain its bodies, or the one that contains several.
      runs_once: whether it evaluates its one body once, on all its operands unchanged.
    """

    name: str
    parameters: tuple[str, ...]
    runs_once: bool = False


_JIT = Construct("jit", ("jaxpr",), runs_once=True)
_REMAT = Construct("remat", ("jaxpr",), runs_once=True)
_CALL = Construct("call", ("call_jaxpr",), runs_once=True)

CONSTRUCTS: dict[str, Construct] = {
    "jit": _JIT,
    "pjit": _JIT,
    "remat": _REMAT,
    "remat2": _REMAT,
    "checkpoint": _REMAT,
    "call": _CALL,
    "core_call": _CALL,
    "closed_call": _CALL,
    "eval_jaxpr": _CALL,  # both of these in JAX 0.12
    "custom_jvp_call": Construct("custom_jvp", ("call_jaxpr",), runs_once=True),
    "custom_vjp_call": Construct("custom_vjp", ("call_jaxpr",), runs_once=True),
    "shard_map": Construct("shard_map", ("jaxpr",)),  # once on every device, on a part of each
    "cond": Construct("cond", ("branches",)),
    "while": Construct("while", ("cond_jaxpr", "body_jaxpr")),
    "scan": Construct("scan", ("jaxpr",)),
}


def construct_of(eqn: Equation) -> Construct | None:
    """Return the construct of an equation; None where it has no body to enter."""
    return CONSTRUCTS.get(eqn.primitive.name)


def bodies_of(eqn: Equation) -> list[Operand]:
    """Return the jaxprs of an equation that has bodies: several for `cond` and `while`."""
    found: list[Operand] = []
    for name in CONSTRUCTS[eqn.primitive.name].parameters:
        body = eqn.params[name]
        found += body if isinstance(body, (tuple, list)) else [body]
    return found


def body_names(eqn: Equation) -> list[str]:
    """Return how a path names each body: `"jit:step"`, `"scan"`, `"cond/0"`, `"while/body"`."""
    name = eqn.primitive.name
    construct = CONSTRUCTS[name].name
    if construct == "while":
        return ["while/cond", "while/body"]
    if construct == "cond":
        return [f"cond/{i}" for i in range(len(eqn.params["branches"]))]
    called = eqn.params.get("name") or (
        compat.function_name(bodies_of(eqn)[0]) if CONSTRUCTS[name].runs_once else ""
    )
    return [f"{name}:{called}" if called else name]
