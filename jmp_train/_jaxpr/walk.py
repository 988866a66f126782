"""Walks the equations of a jaxpr, with a value of any type for each variable.

Three walks share it: the planner's values are dtypes, the emitter's are arrays in several dtypes,
and the replay's are arrays with the causes of their infinities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

from jax.extend.core import Literal

from jmp_train._jaxpr.compat import Atom, Body, Operand

V = TypeVar("V")


class Environment(Generic[V]):
    """The values of a body's variables.

    Args:
      variables: those that have a value before the first equation.
      values: a value for each.
      literal: makes the value of a literal.
    """

    def __init__(
        self, variables: Iterable[Operand], values: Iterable[V], literal: Callable[[Any], V]
    ):
        self._values: dict[Any, V] = dict(zip(variables, values, strict=True))
        self._literal = literal

    def read(self, atom: Atom) -> V:
        return self._literal(atom) if isinstance(atom, Literal) else self._values[atom]

    def read_all(self, atoms: Iterable[Operand]) -> list[V]:
        return [self.read(atom) for atom in atoms]

    def write(self, variables: Iterable[Operand], values: Iterable[V]) -> None:
        self._values.update(zip(variables, values, strict=True))

    def drop(self, variables: Iterable[Operand]) -> None:
        for variable in variables:
            del self._values[variable]


def walk(
    body: Body,
    args: Sequence[V],
    equation: Callable[[int, Any, list[V]], Sequence[V]],
    *,
    constant: Callable[[Any, Any], V],
    literal: Callable[[Any], V],
    keep_all: bool = False,
) -> Environment[V]:
    """Evaluate each equation of a body in order, and return the environment at the end.

    Args:
      body: the jaxpr and its constants.
      args: a value for each input.
      equation: `equation(index, eqn, operands) -> results`, a value for each output variable.
      constant: `constant(variable, array)`, the value of a constant.
      literal: the value of a literal.
      keep_all: whether to keep the values that no later equation reads; else each is dropped after
        its last use, so that its memory is free, and the environment ends with the outputs.
    """
    consts = map(constant, body.constvars, body.consts)
    env = Environment(body.all_invars, (*consts, *args), literal)
    last = {} if keep_all else _last_uses(body)
    for i, eqn in enumerate(body.eqns):
        env.write(eqn.outvars, equation(i, eqn, env.read_all(eqn.invars)))
        env.drop(last.get(i, ()))
    return env


def _last_uses(body: Body) -> dict[int, list[Operand]]:
    """Return the variables that no equation after the i-th reads, by i."""
    last: dict[Any, int] = {}
    for i, eqn in enumerate(body.eqns):
        for atom in (*eqn.invars, *eqn.outvars):
            if not isinstance(atom, Literal):
                last[atom] = i
    for atom in body.outvars:
        if not isinstance(atom, Literal):
            last.pop(atom, None)
    by_equation: dict[int, list[Operand]] = {}
    for variable, i in last.items():
        by_equation.setdefault(i, []).append(variable)
    return by_equation
