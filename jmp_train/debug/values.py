"""Values under replay: arrays, and the causes of what is not finite in them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jmp_train._jaxpr.compat import Equation, Operand
from jmp_train._jaxpr.interpret import Place
from jmp_train.tree import all_finite


class Cause:
    """A cause of non-finite values: an operation's result, an argument or a constant."""

    def __init__(self, order: int, parents: tuple[Cause, ...] = ()):
        self.order = order
        self.parents = parents
        self.argument = ""
        self.constant = False
        self.origin: Origin | None = None  # of an operation that a chain of causes may begin at


class Origin(NamedTuple):
    """An operation that made non-finite values, described where a chain of causes begins at it."""

    eqn: Equation
    operands: list[ReplayedValue]
    out: Operand
    place: Place
    after: str
    rank: int  # 0: out of finite numbers; 1: a NaN out of infinities; 2: it read a constant


class ReplayedValue(NamedTuple):
    """An array under replay."""

    array: Operand
    causes: tuple[Cause, ...] = ()  # of its infinities and NaNs; none where it is finite
    argument: str = ""  # the argument that it is, at most cast or reshaped


_all_finite = jax.jit(all_finite)


def is_inexact(x: Operand) -> bool:
    return jnp.issubdtype(getattr(x, "dtype", np.result_type(type(x))), jnp.inexact)


def is_finite(x: Operand) -> bool:
    if not is_inexact(x):
        return True
    if np.size(x) < 2**16:  # a copy to the host costs less than to compile for this shape
        return bool(np.isfinite(np.asarray(x)).all())
    return bool(_all_finite(x))


def has_nan(x: Operand) -> bool:
    return is_inexact(x) and bool(np.isnan(np.asarray(x)).any())
