"""Emits functions with derivative rules of their own; the rules run under the same autocast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero

from jmp_train._autocast.emit import Emitter
from jmp_train._autocast.kinds import Kind, kind_of_aval
from jmp_train._autocast.operands import Operands
from jmp_train._autocast.plans import OpPlan
from jmp_train._autocast.values import array_in, array_of_kind, exact_array, kind_of, value_of
from jmp_train._jaxpr import compat
from jmp_train._jaxpr.compat import Operand


class ResidualSpec(NamedTuple):
    """A residual of a `custom_vjp` rule.

    Attributes:
      kind: of the array that is stored.
      dtype: the dtype that the rule was written for.
      constant: whether it is a constant of the code.
    """

    kind: Kind | None
    dtype: Any
    constant: bool


def emit_custom_jvp(emitter: Emitter, op: OpPlan, values: list[Operand]) -> list[Operand]:
    params, operands = op.eqn.params, Operands(values, op.requests, copies=True)
    symbolic = params["symbolic_zeros"]
    first, skip = operands.first_arguments(), params["num_consts"]
    kinds = [kind_of(v) for v in values[skip:]]

    def rule(primals: Any, tangents: Any) -> Any:
        tangents = [tangents[i] for i in first[skip:]]
        zeros = [symbolic and compat.is_symbolic_zero(t) for t in tangents]
        body, out_zeros = compat.jvp_rule(params, zeros)
        tangents = [t for t, zero in zip(tangents, zeros, strict=True) if not zero]
        tangent_kinds = [kind_of_aval(jax.typeof(t)) for t in tangents]
        plan = emitter.planner.plan(body, [*kinds, *tangent_kinds], op.bodies[0].region)
        given = [value_of(k, t) for k, t in zip(tangent_kinds, tangents, strict=True)]
        outs = emitter.run(plan, [*operands.unflatten(primals)[skip:], *given])
        n = len(op.outs)
        primals_out = [array_of_kind(v, k) for v, k in zip(outs[:n], op.outs, strict=True)]
        rest = iter(outs[n:])
        return primals_out, [
            SymbolicZero(jax.typeof(p).to_tangent_aval()) if zero else array_of_kind(next(rest), k)
            for p, k, zero in zip(primals_out, op.outs, out_zeros, strict=True)
        ]

    custom = jax.custom_jvp(_primal(emitter, op, operands))
    custom.defjvp(rule, symbolic_zeros=symbolic)
    outs = custom(*operands.args)
    return [value_of(kind, out) for kind, out in zip(op.outs, outs, strict=True)]


def emit_custom_vjp(emitter: Emitter, op: OpPlan, values: list[Operand]) -> list[Operand]:
    params, operands = op.eqn.params, Operands(values, op.requests, copies=True)
    symbolic, skip = params["symbolic_zeros"], params["num_consts"]
    first = operands.first_arguments()
    specs: list[ResidualSpec] = []
    perturbable = [
        jnp.issubdtype(atom.aval.dtype, jnp.inexact) and not constant
        for atom, constant in zip(op.eqn.invars[skip:], op.constant[skip:], strict=True)
    ]

    def forward(*args: Any) -> Any:
        # Under `vmap`, what the rule closes over is among the operands, and must not be perturbed.
        nonzeros = [args[i].perturbed for i in first[skip:]] if symbolic else perturbable
        args = tuple(a.value for a in args) if symbolic else args
        given = operands.unflatten(args)
        rule = compat.vjp_rule(params, nonzeros)
        ins = [kind_of(v) for v in given[skip:]]
        plan = emitter.planner.plan(rule.forward, ins, op.bodies[0].region)
        outs = emitter.run(plan, given[skip:])
        split = len(outs) - len(op.outs)
        made = iter(zip(outs, rule.forward.outvars, strict=True))
        residuals: list[Operand] = []
        specs.clear()
        for i in rule.inputs:
            value, atom = next(made) if i is None else (given[i], op.eqn.invars[i])
            constant = rule.forward.is_constant(atom) if i is None else op.constant[i]
            residuals.append(exact_array(value))
            specs.append(ResidualSpec(kind_of(value), atom.aval.dtype, constant))
        shown = [array_of_kind(v, k) for v, k in zip(outs[split:], op.outs, strict=True)]
        return shown, residuals

    def backward(residuals: Any, cotangents: Any) -> Any:
        cts, logs = _run_backward(emitter, op, specs, residuals, cotangents)
        back: list[Operand] = [None] * len(operands.args)
        for i, ct in zip(first[skip:], cts, strict=True):
            back[i] = ct if ct is None else array_in(ct, jax.typeof(operands.args[i]).dtype)
        return tuple(back), logs

    custom = jax.custom_vjp(_primal(emitter, op, operands))
    compat.define_vjp(custom, forward, backward, symbolic)
    outs = custom(*operands.args)
    return [value_of(kind, out) for kind, out in zip(op.outs, outs, strict=True)]


def _run_backward(
    emitter: Emitter,
    op: OpPlan,
    specs: Sequence[ResidualSpec],
    residuals: Sequence[Operand],
    cotangents: Sequence[Operand],
) -> tuple[list[Operand], dict[str, Any] | None]:
    """Run the user's backward rule, traced in the dtypes that it was written for.

    Returns:
      The cotangents, None for a zero, and the logs of the rule, in the dtypes that it was written
      in.
    """
    static, values, avals = _backward_arguments(op, specs, residuals, cotangents)
    total = len(specs) + len(cotangents)
    zero: list[bool] = []
    logged: list[Operand] = []  # the structure of the logs

    def written_rule(*args: Any) -> Any:
        rest = iter(args)
        args = tuple(static[i] if i in static else next(rest) for i in range(total))
        outs, logs = compat.run_backward(op.eqn.params, args)
        zero[:] = [out is None or compat.is_symbolic_zero(out) for out in outs]
        leaves, tree = jax.tree.flatten(logs)
        logged[:] = [tree]
        return [
            *[out for out, is_zero in zip(outs, zero, strict=True) if not is_zero],
            *leaves,
        ]

    closed = compat.trace(written_rule, avals)
    plan = emitter.planner.plan(closed, [kind_of(v) for v in values], op.bodies[0].region)
    outs = iter(emitter.run(plan, values))
    cts = [None if is_zero else next(outs) for is_zero in zero]
    (tree,) = logged
    log_avals = closed.out_avals[len(closed.out_avals) - tree.num_leaves :]
    logs = [array_in(v, a.dtype) for v, a in zip(outs, log_avals, strict=True)]
    return cts, jax.tree.unflatten(tree, logs)


def _backward_arguments(
    op: OpPlan,
    specs: Sequence[ResidualSpec],
    residuals: Sequence[Operand],
    cotangents: Sequence[Operand],
) -> tuple[dict[int, Any], list[Operand], list[Operand]]:
    """Return the arguments of a backward rule that are not traced, by index, and those that are.

    Not traced are symbolic zeros, which have no array, and constants, whose values a rule may read.
    """
    static: dict[int, Any] = {}
    values, avals = [], []
    for i, (spec, x) in enumerate(zip(specs, residuals, strict=True)):
        if spec.constant and not isinstance(x, Tracer):
            static[i] = x
        else:
            values.append(value_of(spec.kind, x))
            avals.append(compat.aval_like(jax.typeof(x), spec.dtype))
    for i, (ct, var) in enumerate(zip(cotangents, op.eqn.outvars, strict=True), len(specs)):
        if compat.is_symbolic_zero(ct):
            aval = compat.aval_like(ct.aval, var.aval.to_tangent_aval().dtype)
            static[i] = SymbolicZero(aval)
        elif ct.dtype == jax.dtypes.float0:
            static[i] = ct
        else:
            values.append(value_of(kind_of_aval(jax.typeof(ct)), ct))
            avals.append(compat.aval_like(jax.typeof(ct), var.aval.dtype))
    return static, values, avals


def _primal(emitter: Emitter, op: OpPlan, operands: Operands) -> Callable[..., list[Operand]]:
    """Return the function without its rules, under the name that it had."""
    body = emitter.body(op.bodies[0], operands, op.outs)

    def primal(*args: Any) -> list[Operand]:
        return list(body(*args))

    name = compat.function_name(op.eqn.params["call_jaxpr"])
    if name:
        primal.__name__ = primal.__qualname__ = name
    return primal
