"""Plans the casts that the author wrote."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from jmp_train._autocast.kinds import kind_of_aval, native_dtype, promote
from jmp_train._autocast.plans import ArrayRequests, OpPlan, PlannedValue
from jmp_train._autocast.regions import is_stored_as
from jmp_train._jaxpr.compat import Equation


def plan_cast(eqn: Equation, value: PlannedValue) -> tuple[OpPlan, ArrayRequests | None]:
    """Return the plan of a cast, and the requests of its operand where its result shares the array.

    A widening cast keeps the narrow array available, so that casting back is free; a narrowing one
    is shared with autocast's own casts.
    """
    (atom,), (var,) = eqn.invars, eqn.outvars
    kind, new = value.kind, kind_of_aval(var.aval)
    if kind is None or new is None:
        exact = (
            kind.base
            if kind and not jnp.issubdtype(var.aval.dtype, np.complexfloating)
            else native_dtype(kind_of_aval(atom.aval))
        )
        if new is not None and kind is None:
            binary = atom.aval.dtype == np.bool_
            new = dataclasses.replace(new, formats=value.number, binary=binary)
        return OpPlan(eqn, "cast", new.native if new else None, [exact], [new]), None
    old = atom.aval.dtype
    if promote([old, new.native]) == new.native:
        native = promote([kind.native, new.native]) or new.native
        native = kind.native if is_stored_as(eqn) else native
        formats = kind.formats if old == new.native else None
        widened = dataclasses.replace(kind, native=native, formats=formats)
        return OpPlan(eqn, "cast", native, [None], [widened]), value.requests
    return OpPlan(eqn, "cast", new.native, [new.native], [new]), None
