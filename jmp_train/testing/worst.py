"""Finds the operation whose own rounding errors move a result most.

The error of an operation alone is the difference between its result and the float64 result of the
same operation on the same operands. To rank operations by what these errors do to the result, the
program runs in float64 with the errors of one operation added, and again for each operation. This
needs no derivatives, so it also works where the program branches, sorts or saturates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jmp_train._autocast.regions import module_path
from jmp_train._autocast.traced import TracedFunction
from jmp_train._jaxpr import compat
from jmp_train._jaxpr.bodies import body_names, construct_of
from jmp_train._jaxpr.compat import Equation, Operand
from jmp_train._jaxpr.equations import Place
from jmp_train._jaxpr.interpret import Interpreter
from jmp_train._jaxpr.source import own_line
from jmp_train.testing.wide import as_received, bind_wide, on_host, wide_dtype, widen

#: Operations whose effect on the result is computed: those with the largest relative errors.
CANDIDATES = 32

Hook = Callable[[Equation, list[Operand], list[Operand], Place], None]
Key = tuple[int, Place]  # an equation and its place: a jitted function that is called twice has two


class WorstOperation(NamedTuple):
    """The operation whose own errors move a result most.

    Attributes:
      description: its name, dtype, place in the model and source line.
      effect: how far its errors alone move the result.
    """

    description: str
    effect: float


def describe(eqn: Equation, place: Place, dtype: str) -> str:
    """Return `"reduce_sum in bfloat16 (scan of encoder/dense; model.py:12 (loss))"`."""
    where = " of ".join(filter(None, ("/".join(place.path), module_path(place.stack_of(eqn)))))
    details = "; ".join(filter(None, (where, own_line(eqn, place.callers))))
    name = body_names(eqn)[0] if construct_of(eqn) else eqn.primitive.name
    return f"{name} in {dtype}" + (f" ({details})" if details else "")


def observe(traced: TracedFunction, hook: Hook) -> list[Operand]:
    """Run a traced function step by step in its own dtypes, and return its results.

    Args:
      traced: the function and its arguments.
      hook: `hook(eqn, operands, results, place)`, called after each operation, with 64-bit types
        enabled; not after those on a `jax.Ref`.
    """

    def operation(eqn: Equation, operands: list[Operand], place: Place) -> list[Operand]:
        with compat.context_of(eqn):
            outs = compat.bind(eqn.primitive, operands, eqn.params)
        if not any(isinstance(x, jax.Ref) for x in (*operands, *outs)):  # reads, writes: no values
            hook(eqn, operands, outs, place)
        return outs

    arrays = [as_received(x) for x in traced.arrays]
    with jax.enable_x64(True):
        interpreter = Interpreter(operation, lambda x: x, stepwise=True)
        return interpreter.run(compat.body_of(traced.closed), arrays)


def wide_results(eqn: Equation, operands: Sequence[Operand]) -> list[Operand]:
    """Return the float64 results of an operation on given operands, on the host."""
    return [on_host(x) for x in bind_wide(eqn, [widen(x) for x in operands])]


def worst_operation(
    traced: TracedFunction, result: Callable[[Sequence[Operand]], float]
) -> WorstOperation | None:
    """Return the operation whose own errors move a result most; None where none moves it.

    Args:
      traced: the function and its arguments.
      result: the number of interest, from the arrays that the function returns.
    """
    found = _by_relative_error(traced)
    errors = _errors_of(traced, {key for key, *_ in found})
    exact = result(_run_with_errors(traced, None, []))
    effects = []
    for key, description in found:
        moved = abs(result(_run_with_errors(traced, key, errors[key])) - exact)
        effects.append(WorstOperation(description, math.inf if math.isnan(moved) else moved))
    worst = max(effects, key=lambda e: e.effect, default=None)
    return worst if worst is not None and worst.effect > 0 else None


def _by_relative_error(traced: TracedFunction) -> list[tuple[Key, str]]:
    """Return the operations with the largest errors of their own, largest first."""
    found: dict[Key, tuple[float, str]] = {}

    def hook(eqn: Equation, operands: list[Operand], outs: list[Operand], place: Place) -> None:
        errors = _own_errors(eqn, operands, outs)
        worst = max((relative for _, relative in errors), default=0.0)
        if worst > found.get((id(eqn), place), (0.0, ""))[0]:
            dtype = next(x.dtype.name for x in outs if _rounds(x))
            found[id(eqn), place] = (worst, describe(eqn, place, dtype))

    observe(traced, hook)
    ranked = sorted(found.items(), key=lambda item: -item[1][0])
    return [(key, description) for key, (_, description) in ranked[:CANDIDATES]]


def _errors_of(traced: TracedFunction, keys: set[Key]) -> dict[Key, list[list[np.ndarray]]]:
    """Return the errors of some operations, at each of their evaluations."""
    errors: dict[Key, list[list[np.ndarray]]] = {key: [] for key in keys}

    def hook(eqn: Equation, operands: list[Operand], outs: list[Operand], place: Place) -> None:
        if (id(eqn), place) in errors:
            errors[id(eqn), place].append([error for error, _ in _own_errors(eqn, operands, outs)])

    observe(traced, hook)
    return errors


def _run_with_errors(
    traced: TracedFunction, key: Key | None, errors: Sequence[Sequence[np.ndarray]]
) -> list[Operand]:
    """Return the results in float64, with errors added to those of one operation."""
    remaining = iter(errors)

    def operation(eqn: Equation, operands: list[Operand], place: Place) -> list[Operand]:
        outs = bind_wide(eqn, operands)
        if (id(eqn), place) != key:
            return outs
        added = iter(next(remaining, ()))
        return [x + next(added, 0.0) if _rounds(x) else x for x in outs]

    arrays = [as_received(x) for x in traced.arrays]
    with jax.enable_x64(True):
        interpreter = Interpreter(operation, widen, stepwise=True)
        return interpreter.run(compat.body_of(traced.closed), [widen(x) for x in arrays])


def _rounds(x: Operand) -> bool:
    """Return whether an array is floating or complex."""
    return wide_dtype(x.dtype) is not None


def _own_errors(
    eqn: Equation, operands: list[Operand], outs: list[Operand]
) -> list[tuple[np.ndarray, float]]:
    """Return the errors of each floating or complex result.

    Each has the largest beside it, relative to the root mean square of the result.
    """
    if not any(map(_rounds, outs)):
        return []
    pairs = zip(outs, wide_results(eqn, operands), strict=True)
    errors = []
    with np.errstate(all="ignore"):
        for out, wide in ((on_host(o), w) for o, w in pairs if _rounds(o)):
            same = (out == wide) | (np.isnan(out) & np.isnan(wide))
            error = np.where(same, 0.0, out - wide)
            size = np.sqrt(np.mean(np.square(np.abs(wide)))) if wide.size else 1.0
            largest = float(np.abs(error).max(initial=0.0))
            relative = largest / size if size > 0 else math.inf if largest else 0.0
            errors.append((error, math.inf if math.isnan(relative) else float(relative)))
    return errors
