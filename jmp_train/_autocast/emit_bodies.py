"""Emits operations that have bodies; bodies are retraced under their plans."""

from __future__ import annotations

from collections.abc import Callable

import jax

from jmp_train._autocast.emit import Emitter
from jmp_train._autocast.emit_custom import emit_custom_jvp, emit_custom_vjp
from jmp_train._autocast.operands import OperandGroups, Operands, carries
from jmp_train._autocast.plans import OpPlan
from jmp_train._autocast.values import exact_array, value_of
from jmp_train._jaxpr import compat
from jmp_train._jaxpr.compat import Operand


def emit_call(emitter: Emitter, op: OpPlan, values: list[Operand]) -> list[Operand]:
    """Emit the body in place: nothing is left of the call."""
    return emitter.run(op.bodies[0], values)


def emit_jit(emitter: Emitter, op: OpPlan, values: list[Operand]) -> list[Operand]:
    operands, params = Operands(values, op.requests), dict(op.eqn.params)
    avals = [jax.typeof(a) for a in operands.args]
    params["jaxpr"] = emitter.traced(op.bodies[0], operands, avals, op.outs)
    for name in ("in_shardings", "in_layouts"):
        if name in params:
            params[name] = operands.per_argument(params[name])
    if "donated_invars" in params:  # a cast copy is not the caller's buffer
        params["donated_invars"] = operands.per_argument(params["donated_invars"], lambda _: False)
    return emitter.bound(op, operands.args, params)


def emit_remat(emitter: Emitter, op: OpPlan, values: list[Operand]) -> list[Operand]:
    operands = Operands(values, op.requests)
    closed = emitter.traced(op.bodies[0], operands, [jax.typeof(a) for a in operands.args], op.outs)
    jaxpr, consts = compat.open_jaxpr(closed)
    return emitter.bound(op, [*consts, *operands.args], {**op.eqn.params, "jaxpr": jaxpr})


def emit_cond(emitter: Emitter, op: OpPlan, values: list[Operand]) -> list[Operand]:
    operands = Operands(values[1:], op.requests[1:])
    avals = [jax.typeof(a) for a in operands.args]
    branches = tuple(emitter.traced(body, operands, avals, op.outs) for body in op.bodies)
    params = {**op.eqn.params, "branches": branches}
    return emitter.bound(op, [exact_array(values[0]), *operands.args], params)


def emit_while(emitter: Emitter, op: OpPlan, values: list[Operand]) -> list[Operand]:
    params = dict(op.eqn.params)
    nc, nb = params["cond_nconsts"], params["body_nconsts"]
    cond = Operands(values[:nc], op.requests[:nc])
    body = Operands(values[nc : nc + nb], op.requests[nc : nc + nb])
    carry = carries(values[nc + nb :], op.outs)
    carried = [v.aval for v in op.eqn.outvars]
    params["cond_jaxpr"] = emitter.traced(
        op.bodies[0], OperandGroups(cond, carry), [*map(jax.typeof, cond.args), *carried], [None]
    )
    params["body_jaxpr"] = emitter.traced(
        op.bodies[1], OperandGroups(body, carry), [*map(jax.typeof, body.args), *carried], op.outs
    )
    params["cond_nconsts"], params["body_nconsts"] = len(cond.args), len(body.args)
    return emitter.bound(op, [*cond.args, *body.args, *carry.args], params)


def emit_scan(emitter: Emitter, op: OpPlan, values: list[Operand]) -> list[Operand]:
    params = dict(op.eqn.params)
    nc, ncar = compat.scan_counts(params)
    consts = Operands(values[:nc], op.requests[:nc], copies=True)
    carry = carries(values[nc : nc + ncar], op.outs[:ncar])
    xs = Operands(values[nc + ncar :], op.requests[nc + ncar :])
    slices = [v.aval for v in compat.body_of(params["jaxpr"]).invars[nc + ncar :]]
    avals = [
        *map(jax.typeof, consts.args),
        *[v.aval for v in compat.body_of(params["jaxpr"]).invars[nc : nc + ncar]],
        *[compat.aval_like(a, x.dtype) for a, x in zip(slices, xs.args, strict=True)],
    ]
    operands = OperandGroups(consts, carry, xs)
    params["jaxpr"] = emitter.traced(op.bodies[0], operands, avals, op.outs)
    params = compat.with_scan_consts(params, len(consts.args))
    if "linear" in params:
        linear = params["linear"]
        params["linear"] = (*consts.per_argument(linear[:nc], lambda _: False), *linear[nc:])
    return emitter.bound(op, [*consts.args, *carry.args, *xs.args], params)


def emit_shard_map(emitter: Emitter, op: OpPlan, values: list[Operand]) -> list[Operand]:
    params = op.eqn.params
    operands = Operands(values, op.requests, copies=True)
    outs = jax.shard_map(
        emitter.body(op.bodies[0], operands, op.outs),
        mesh=params["mesh"],
        in_specs=operands.per_argument(params["in_specs"]),
        out_specs=tuple(params["out_specs"]),
        axis_names=params["newly_manual_axes"],
        check_vma=params["check_vma"],
    )(*operands.args)
    return [value_of(kind, out) for kind, out in zip(op.outs, outs, strict=True)]


#: By construct; see `jmp_train._jaxpr.bodies`.
EMITTERS_OF_BODIES: dict[str, Callable[..., list[Operand]]] = {
    "jit": emit_jit,
    "remat": emit_remat,
    "call": emit_call,
    "custom_jvp": emit_custom_jvp,
    "custom_vjp": emit_custom_vjp,
    "shard_map": emit_shard_map,
    "cond": emit_cond,
    "while": emit_while,
    "scan": emit_scan,
}
