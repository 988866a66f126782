"""Explains `autocast`: each operation, the dtype that it will run in, and the rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from jmp_train._autocast.kinds import kind_of_aval, parse_compute_dtype
from jmp_train._autocast.op_rules import OpRules, default_op_rules
from jmp_train._autocast.planner import Planner
from jmp_train._autocast.plans import OpPlan, Plan
from jmp_train._autocast.traced import TracedFunction
from jmp_train._jaxpr.bodies import body_names
from jmp_train._jaxpr.source import source_line
from jmp_train.types import Function


@dataclasses.dataclass(frozen=True)
class OpRow:
    """One operation, as autocast will run it.

    Attributes:
      path: the bodies that contain it, outermost first, such as `"jit:step/scan"`.
      op: the primitive's name; of a function that is traced in half precision, its own.
      dtype: the dtype that its operands are cast to, such as `"bfloat16"`.
      written: the dtype that it was traced with.
      rule: `"compute"`, `"float32"`, `"promote"`, `"region"`, `"cast"` (the author's own) or
        `"as written"`.
      note: the reason, where the rule alone does not tell; often empty.
      scope: the name scope that it was written in (Linen puts its module path there).
      source: file, line and function.
    """

    path: str
    op: str
    dtype: str
    written: str
    rule: str
    note: str
    scope: str
    source: str


@dataclasses.dataclass(frozen=True)
class AutocastReport:
    """Result of `explain_autocast`; `str()` formats it as a table, `rows` has the same data."""

    rows: tuple[OpRow, ...]

    def __str__(self) -> str:
        head = ("path", "op", "written", "runs in", "rule", "source")
        lines = [head, *map(_cells, self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        padded = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
        return "\n".join(padded)


def explain_autocast(
    fn: Function,
    *args: Any,
    compute_dtype: Any = "bfloat16",
    rules: OpRules = default_op_rules,
    **kwargs: Any,
) -> AutocastReport:
    """Return each operation of `fn(*args, **kwargs)`, the dtype it would run in, and the reason.

    Nothing is computed: arguments may be `jax.ShapeDtypeStruct`s. Operations on integers alone
    are left out. Derivative rules are not shown, but explaining `jax.grad(loss)` shows what they
    did.

    Args:
      fn, *args, **kwargs: the function and its arguments.
      compute_dtype, rules: as for `autocast`.

    Raises:
      As `autocast`.

    >>> import jax.numpy as jnp
    >>> report = explain_autocast(lambda x: jnp.exp(x @ x), jnp.ones((2, 2)))
    >>> [(row.op, row.dtype, row.rule) for row in report.rows]
    [('dot_general', 'bfloat16', 'compute'), ('exp', 'float32', 'float32')]
    """
    traced = TracedFunction(fn, args, kwargs)
    planner = Planner(parse_compute_dtype(compute_dtype), rules)
    plan = traced.plan(planner)
    return AutocastReport(tuple(_rows(plan, ())))


def _rows(plan: Plan, path: tuple[str, ...]) -> Iterator[OpRow]:
    for op in plan.ops:
        for name, sub in zip(_body_names(op), op.bodies, strict=True):
            yield from _rows(sub, (*path, name))
        if op.dtype is not None and op.rule != "enter":
            yield _row(op, path)


def _body_names(op: OpPlan) -> list[str]:
    return body_names(op.eqn) if op.bodies else []


def _row(op: OpPlan, path: tuple[str, ...]) -> OpRow:
    avals = [kind_of_aval(atom.aval) for atom in (*op.eqn.invars, *op.eqn.outvars)]
    before = dict.fromkeys(k.native.name for k in avals if k)
    return OpRow(
        "/".join(path),
        op.eqn.params["name"] if op.in_half else op.eqn.primitive.name,
        op.dtype.name if op.dtype else "",
        "/".join(before),
        op.rule,
        op.note,
        str(op.eqn.source_info.name_stack),
        source_line(op.eqn),
    )


def _cells(row: OpRow) -> tuple[str, ...]:
    rule = f"{row.rule}: {row.note}" if row.note else row.rule
    where = f"{row.source} in {row.scope}" if row.scope else row.source
    return (row.path or "-", row.op, row.written, row.dtype, rule, where)
