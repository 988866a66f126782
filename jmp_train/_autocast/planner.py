"""Decides, before anything is traced again, the dtype that every operation of a jaxpr runs in.

The decision needs dtypes alone, so a plan is made by one cheap walk. It says for each equation the
dtype of every operand, and for each input of a jaxpr the dtypes that its body requests: that is how
a scan learns to cast a weight outside. Plans of the bodies of `scan`, `jit` and the others are
stored by the kinds of their inputs, so a function called twice is planned once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jmp_train._autocast.kinds import (
    FLOAT32,
    HALF,
    Formats,
    Kind,
    formats_of_literal,
    kind_of_aval,
    kind_of_input,
    kind_of_literal,
    native_dtype,
)
from jmp_train._autocast.op_rules import RAISED, OpRules
from jmp_train._autocast.plan_bodies import PLANS_OF_BODIES
from jmp_train._autocast.plan_casts import plan_cast
from jmp_train._autocast.plan_operations import Operation
from jmp_train._autocast.plans import ArrayRequests, OpPlan, Plan, PlannedValue
from jmp_train._autocast.regions import MarkedRegion, region_of
from jmp_train._autocast.traced_in_half import plan_in_half
from jmp_train._jaxpr.bodies import construct_of
from jmp_train._jaxpr.compat import Body, Equation, Jaxpr, Operand, body_of
from jmp_train._jaxpr.walk import walk


class Planner:
    """Plans jaxprs under one compute dtype and one set of rules.

    Args:
      compute: the dtype of the compute rule.
      rules: the lists.
    """

    def __init__(self, compute: np.dtype, rules: OpRules):
        self.compute = compute
        self.rules = rules
        self._plans: dict[Any, Plan] = {}

    def plan(
        self,
        jaxpr: Jaxpr,
        ins: Sequence[Kind | None],
        region: MarkedRegion | None = None,
        fixed_outputs: int = 0,
        numbers: Sequence[Formats | None] = (),
    ) -> Plan:
        """Return the plan of a jaxpr.

        Args:
          jaxpr: an open or a closed jaxpr, or its `Body`.
          ins: the kind of each input.
          region: the region that encloses it, None where none does.
          fixed_outputs: how many outputs, from the first, keep the dtypes of the code.
          numbers: per input, `PlannedValue.number`.
        """
        body = jaxpr if isinstance(jaxpr, Body) else body_of(jaxpr)
        consts = tuple(map(id, body.consts))
        key = (id(body.jaxpr), consts, tuple(ins), region, fixed_outputs, tuple(numbers))
        if key not in self._plans:
            raised: set[int] = set()
            planning = _Planning(self, body, ins, region, fixed_outputs, numbers, raised)
            while more := planning.raisable():
                raised |= more
                planning = _Planning(self, body, ins, region, fixed_outputs, numbers, raised)
            self._plans[key] = planning.result  # has the jaxpr, so that no other gets its id
        return self._plans[key]

    def dtype_of_products(self, region: MarkedRegion | None) -> np.dtype:
        """Return the dtype that a product of float32 arrays runs in."""
        if region is not None and not region.lists:
            return region.dtype
        if "dot_general" not in self.rules.compute:
            return FLOAT32
        return region.dtype if region else self.compute


class _Planning:
    """One walk over a jaxpr; `raised` has the sums that float32 operations alone read."""

    def __init__(
        self,
        planner: Planner,
        body: Body,
        ins: Sequence[Kind | None],
        region: MarkedRegion | None,
        fixed_outputs: int,
        numbers: Sequence[Formats | None],
        raised: set[int],
    ):
        self.planner = planner
        self.region = region
        self.raised = raised
        numbers = [*numbers, *[None] * (len(ins) - len(numbers))]
        args = [PlannedValue(k, ArrayRequests(), n) for k, n in zip(ins, numbers, strict=True)]
        ops: list[OpPlan] = []

        def equation(index: int, eqn: Equation, values: list[PlannedValue]) -> list[PlannedValue]:
            op, outs = self.equation(index, eqn, values)
            ops.append(op)
            return outs

        self.env = walk(body, args, equation, constant=_constant, literal=_literal, keep_all=True)
        results = self.env.read_all(body.outvars)
        for i, (atom, value) in enumerate(zip(body.outvars, results, strict=True)):
            as_written = native_dtype(kind_of_aval(atom.aval))
            as_is = value.kind and value.kind.base
            value.requests.add(as_written if i < fixed_outputs else as_is)
        outs, requests = [v.kind for v in results], [v.requests.dtypes for v in args]
        self.result = Plan(body, list(ins), ops, outs, requests, region)

    def raisable(self) -> set[int]:
        """Return the half-precision sums whose every reader requests float32."""
        found = set()
        for i, op in enumerate(self.result.ops):
            if op.rule == "promote" and op.eqn.primitive.name in RAISED:
                var, kind = op.eqn.outvars[0], op.outs[0]
                if (
                    kind
                    and kind.base in HALF
                    and var.aval.dtype == FLOAT32
                    and set(self.env.read(var).requests.dtypes) == {FLOAT32}
                ):
                    found.add(i)
        return found - self.raised

    def equation(
        self, index: int, eqn: Equation, values: list[PlannedValue]
    ) -> tuple[OpPlan, list[PlannedValue]]:
        region, shared = region_of(eqn, self.region), None
        construct = construct_of(eqn)
        if eqn.primitive.name == "convert_element_type":
            op, shared = plan_cast(eqn, values[0])
        elif (in_half := plan_in_half(eqn, self.planner.dtype_of_products(region))) is not None:
            op = in_half
        elif construct:
            op = PLANS_OF_BODIES[construct.name](self.planner.plan, eqn, values, region)
        else:
            operation = Operation(eqn, [value.kind for value in values])
            planner, raised = self.planner, index in self.raised
            op = operation.plan(planner.rules, planner.compute, region, raised)
        for value, dtype in zip(values, op.operand_dtypes, strict=True):
            value.requests.add(dtype)
        for value, requests in zip(values, op.requests, strict=False):
            for dtype, certain in requests.items():
                value.requests.add(dtype, certain)
        return op, [PlannedValue(kind, shared or ArrayRequests()) for kind in op.outs]


def _constant(variable: Any, _: Any) -> PlannedValue:
    return PlannedValue(kind_of_input(variable.aval), ArrayRequests(), constant=True)


def _literal(literal: Operand) -> PlannedValue:
    kind = kind_of_literal(literal)
    number = None if kind else formats_of_literal(literal)
    return PlannedValue(kind, ArrayRequests(), number, constant=True)
