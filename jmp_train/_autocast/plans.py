"""The dtypes that every operation of a jaxpr will run in, as data: what the planner makes.

An array may be requested in several dtypes. A request is certain, or it is one that the reader
takes where the array exists in that dtype already.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jmp_train._autocast.kinds import Formats, Kind
from jmp_train._autocast.regions import MarkedRegion
from jmp_train._jaxpr.compat import Body, Equation

Requests = dict[np.dtype, bool]
"""The dtypes that an array is requested in, and whether each is certain."""


@dataclasses.dataclass(eq=False)
class ArrayRequests:
    """The requests for one array, which several variables may share."""

    dtypes: Requests = dataclasses.field(default_factory=dict)

    def add(self, dtype: np.dtype | None, certain: bool = True) -> None:
        if dtype is not None:
            self.dtypes[dtype] = self.dtypes.get(dtype, False) or certain


class PlannedValue(NamedTuple):
    """A value of the program while it is planned.

    Attributes:
      kind: of a floating value; None for any other.
      requests: the requests for its array.
      number: for a whole number of the code (the 0 of `jnp.where(x > 0, x, 0)`), the 16-bit dtypes
        whose range contains it.
      constant: whether it is a literal or a constant of the code.
    """

    kind: Kind | None
    requests: ArrayRequests
    number: Formats | None = None
    constant: bool = False


@dataclasses.dataclass
class OpPlan:
    """One equation under the rule that applies to it.

    Attributes:
      eqn: the equation.
      rule: the name of the rule, as `explain_autocast` shows it.
      dtype: the dtype that it runs in; None where it touches no floating number.
      operand_dtypes: per operand; None to pass it unchanged.
      outs: the kinds of the results.
      note: the reason, where the rule alone does not tell.
      bodies: the plans of its bodies.
      requests: per operand, where it has bodies: the requests of the bodies.
      params: the parameters that replace the equation's.
      constant: per operand, where it has bodies: whether it is a constant of the code.
      in_half: the function that runs in place of the equation; see `traced_in_half`.
    """

    eqn: Equation
    rule: str
    dtype: np.dtype | None
    operand_dtypes: list[np.dtype | None]
    outs: list[Kind | None]
    note: str = ""
    bodies: tuple[Plan, ...] = ()
    requests: list[Requests] = dataclasses.field(default_factory=list)
    params: dict[str, Any] | None = None
    constant: list[bool] = dataclasses.field(default_factory=list)
    in_half: Callable[..., list[Any]] | None = None


@dataclasses.dataclass
class Plan:
    """A jaxpr with the dtypes that it will run in; `requests` has an entry for each input."""

    body: Body
    ins: list[Kind | None]
    ops: list[OpPlan]
    outs: list[Kind | None]
    requests: list[Requests]
    region: MarkedRegion | None
