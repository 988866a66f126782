"""Every equation of a traced program, in its bodies too, and the place of each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from jmp_train._jaxpr.bodies import bodies_of, body_names, construct_of
from jmp_train._jaxpr.compat import Equation, Jaxpr, body_of

# Primitives whose jaxpr combines two scalars: part of the operation, not a program of its own.
_COMBINE = frozenset({"reduce", "reduce_window", "scatter", "select_and_scatter"})


class Place(NamedTuple):
    """The place of an equation.

    Attributes:
      path: names of the bodies that contain it, the outermost first.
      stack: name stack of the equations that these belong to.
      callers: tracebacks of these equations, the innermost first.
    """

    path: tuple[str, ...] = ()
    stack: str = ""
    callers: tuple[Any, ...] = ()

    def inside(self, eqn: Equation, name: str) -> Place:
        callers = (eqn.source_info.traceback, *self.callers)
        return Place((*self.path, name), self.stack_of(eqn), callers)

    def stack_of(self, eqn: Equation) -> str:
        return f"{self.stack}/{eqn.source_info.name_stack}"


_OUTERMOST = Place()


def placed_equations(jaxpr: Jaxpr, place: Place = _OUTERMOST) -> Iterator[tuple[Equation, Place]]:
    """Yield every equation of a jaxpr, open or closed, and its place.

    An equation comes before those of its bodies. The bodies of primitives that are not in
    `CONSTRUCTS`, such as a Pallas kernel, are entered too. A derivative rule is not in the jaxpr of
    a function but in that of its derivative.
    """
    for eqn in body_of(jaxpr).eqns:
        yield eqn, place
        for name, body in _named_bodies(eqn):
            yield from placed_equations(body, place.inside(eqn, name))


def has_bodies(eqn: Equation) -> bool:
    """Return whether an equation only evaluates other equations."""
    return bool(_named_bodies(eqn))


def _named_bodies(eqn: Equation) -> list[tuple[str, Jaxpr]]:
    if construct_of(eqn):
        return list(zip(body_names(eqn), bodies_of(eqn), strict=True))
    name = eqn.primitive.name
    if name.partition("-")[0] in _COMBINE:
        return []
    found: list[Any] = []
    for param in eqn.params.values():
        found += param if isinstance(param, (tuple, list)) else [param]
    return [(name, item) for item in found if hasattr(body_of(item).jaxpr, "eqns")]
