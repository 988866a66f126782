"""Re-emits a planned jaxpr: every operation again, on operands in the dtypes that the plan gives.

Bodies are retraced and their equations bound with the parameters that they had, so names,
donation, sharding, unrolling and checkpoint policies stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jmp_train._autocast.kinds import Kind, kind_of_aval
from jmp_train._autocast.operands import OperandGroups, Operands
from jmp_train._autocast.planner import Planner
from jmp_train._autocast.plans import OpPlan, Plan
from jmp_train._autocast.values import Value, array_of_kind, exact_array, value_of
from jmp_train._jaxpr import compat
from jmp_train._jaxpr.bodies import CONSTRUCTS
from jmp_train._jaxpr.compat import Equation, Operand
from jmp_train._jaxpr.scatters import SCATTERS, scatter
from jmp_train._jaxpr.walk import walk
from jmp_train.types import Function


class Emitter:
    """Runs plans. Traced bodies are stored, so a function called twice stays one function.

    Args:
      planner: plans the derivative rules, which are known only when they run.
      bodies: by construct, `emit(emitter, op, values)` for an operation that has bodies.
    """

    def __init__(self, planner: Planner, bodies: Mapping[str, Callable[..., list[Operand]]]):
        self.planner = planner
        self.bodies = bodies
        self._traced: dict[Any, Any] = {}

    def run(self, plan: Plan, values: Sequence[Operand]) -> list[Operand]:
        """Return the values of a plan's outputs from those of its inputs."""

        def equation(index: int, eqn: Equation, operands: list[Operand]) -> list[Operand]:
            with compat.context_of(eqn, line=plan.ops[index].in_half is None):
                return self.op(plan.ops[index], operands)

        env = walk(plan.body, values, equation, constant=_constant, literal=_literal)
        outs = zip(env.read_all(plan.body.outvars), plan.outs, strict=True)
        return [Value(k, v.arrays) if k and isinstance(v, Value) else v for v, k in outs]

    def op(self, op: OpPlan, values: list[Operand]) -> list[Operand]:
        name = op.eqn.primitive.name
        if op.rule == "cast":
            return [_author_cast(op, values[0])]
        if op.rule == "enter":
            return self.bodies[CONSTRUCTS[name].name](self, op, values)
        args = [
            v.get(d) if d and isinstance(v, Value) else exact_array(v)
            for v, d in zip(values, op.operand_dtypes, strict=True)
        ]
        if op.in_half:
            outs = op.in_half(*args)
        elif name in SCATTERS and args[0].dtype != op.eqn.invars[0].aval.dtype:
            outs = [scatter(op.eqn, *args)]
        else:
            outs = compat.bind(op.eqn.primitive, args, op.params or op.eqn.params)
        return [value_of(kind, out) for kind, out in zip(op.outs, outs, strict=True)]

    def body(
        self, plan: Plan, operands: Operands | OperandGroups, outs: Sequence[Kind | None]
    ) -> Function:
        """Return a function from the operands' arguments to `outs`, each in its base dtype."""

        def run(*args: Any) -> Any:
            got = self.run(plan, operands.unflatten(args))
            return tuple(array_of_kind(v, k) for v, k in zip(got, outs, strict=True))

        return run

    def traced(
        self, plan: Plan, operands: Operands | OperandGroups, avals: Sequence[Operand], outs: Any
    ) -> Any:
        """Return the closed jaxpr of `body`."""
        key = (id(plan), operands.key, tuple(avals), tuple(outs))
        if key not in self._traced:
            fun = self.body(plan, operands, outs)
            name = compat.function_name(plan.body.jaxpr)
            self._traced[key] = (plan, compat.trace(fun, avals, name))
        return self._traced[key][1]

    def bound(self, op: OpPlan, args: Sequence[Operand], params: dict[str, Any]) -> list[Operand]:
        """Bind an operation with other arguments and parameters."""
        outs = compat.bind(op.eqn.primitive, args, params)
        return [value_of(kind, out) for kind, out in zip(op.outs, outs, strict=True)]


def _constant(variable: Any, array: Operand) -> Any:
    return value_of(kind_of_aval(variable.aval), array)


def _literal(literal: Operand) -> Any:
    return value_of(kind_of_aval(literal.aval), literal.val)


def _author_cast(op: OpPlan, value: Operand) -> Any:
    kind = op.outs[0]
    if kind and isinstance(value, Value) and op.operand_dtypes[0] is None:
        return Value(kind, value.arrays)
    if kind and isinstance(value, Value):
        return value_of(kind, value.get(kind.native))
    dtype = op.operand_dtypes[0]
    arg = value.get(dtype) if dtype and isinstance(value, Value) else exact_array(value)
    out = compat.bind(op.eqn.primitive, [arg], op.eqn.params)[0]
    return value_of(kind, out)
