"""Plans operations that have bodies: the dtypes that each body requests its operands in.

A function here takes the planner's `plan`, the equation, the values of its operands and the region
that encloses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from jmp_train._autocast.kinds import Kind, joined, kind_of_aval
from jmp_train._autocast.plans import OpPlan, Plan, PlannedValue, Requests
from jmp_train._autocast.regions import MarkedRegion
from jmp_train._jaxpr.bodies import bodies_of
from jmp_train._jaxpr.compat import Equation, scan_counts

PlanBody = Callable[..., Plan]
Values = Sequence[PlannedValue]


def _planned(
    eqn: Equation,
    values: Values,
    bodies: Sequence[Plan],
    requests: list[Requests],
    outs: Iterable[Kind | None],
) -> OpPlan:
    op = OpPlan(eqn, "enter", None, [None] * len(values), list(outs))
    op.bodies, op.requests = tuple(bodies), requests
    op.constant = [value.constant for value in values]
    return op


def _kinds(values: Values) -> list[Kind | None]:
    return [value.kind for value in values]


def plan_once(plan: PlanBody, eqn: Equation, values: Values, region: MarkedRegion | None) -> OpPlan:
    """Plan one body that runs once: it is given its operands in the dtypes that it requests."""
    (jaxpr,) = bodies_of(eqn)
    body = plan(jaxpr, _kinds(values), region, numbers=[v.number for v in values])
    requests = [_settled(k, r) for k, r in zip(body.ins, body.requests, strict=True)]
    return _planned(eqn, values, [body], requests, body.outs)


def plan_remat(
    plan: PlanBody, eqn: Equation, values: Values, region: MarkedRegion | None
) -> OpPlan:
    """Plan a body that runs again in the backward pass: what is kept for it is not widened before."""
    op = plan_once(plan, eqn, values, region)
    op.requests = [_not_widened(k, r) for k, r in zip(_kinds(values), op.requests, strict=True)]
    return op


def plan_unrounded(
    plan: PlanBody, eqn: Equation, values: Values, region: MarkedRegion | None
) -> OpPlan:
    """Plan one body whose operands stay unrounded.

    `shard_map` sums their gradients over devices, and `custom_vjp` rules may read them in float32.
    """
    (jaxpr,) = bodies_of(eqn)
    body = plan(jaxpr, _kinds(values), region, numbers=[v.number for v in values])
    requests = [_uncertain(k, r) for k, r in zip(body.ins, body.requests, strict=True)]
    return _planned(eqn, values, [body], requests, body.outs)


def plan_cond(plan: PlanBody, eqn: Equation, values: Values, region: MarkedRegion | None) -> OpPlan:
    """Plan branches: a cast that every branch makes is made outside, any other inside."""
    kinds = _kinds(values[1:])
    bodies = [plan(branch, kinds, region) for branch in bodies_of(eqn)]
    requests: list[Requests] = [{}]
    for i, kind in enumerate(kinds):
        each = [body.requests[i] for body in bodies]
        dtypes = dict.fromkeys(d for request in each for d in request)
        joint = {d: all(request.get(d, False) for request in each) for d in dtypes}
        requests.append(_settled(kind, joint))
    outs = [joined(ks) for ks in zip(*(body.outs for body in bodies), strict=True)]
    return _planned(eqn, values, bodies, requests, outs)


def plan_while(
    plan: PlanBody, eqn: Equation, values: Values, region: MarkedRegion | None
) -> OpPlan:
    """Plan a loop: carries keep their dtypes; constants go in in every dtype that is requested."""
    nc, nb = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    carry = [kind_of_aval(v.aval) for v in eqn.outvars]
    consts = _kinds(values[: nc + nb])
    test, step = bodies_of(eqn)
    test = plan(test, consts[:nc] + carry, region)
    step = plan(step, consts[nc:] + carry, region, len(carry))
    requests = [_certain(r) for r in (*test.requests[:nc], *step.requests[:nb])]
    return _planned(eqn, values, [test, step], requests + [_as_is(k) for k in carry], carry)


def plan_scan(plan: PlanBody, eqn: Equation, values: Values, region: MarkedRegion | None) -> OpPlan:
    """Plan a scan as `plan_while` does; scanned inputs are cast a slice at a time, inside."""
    nc, ncar = scan_counts(eqn.params)
    carry = [kind_of_aval(v.aval) for v in eqn.outvars[:ncar]]
    consts, xs = _kinds(values[:nc]), _kinds(values[nc + ncar :])
    body = plan(*bodies_of(eqn), [*consts, *carry, *xs], region, ncar)
    requests = [{**_as_is(k), **_certain(r)} for k, r in zip(consts, body.requests, strict=False)]
    requests += [_as_is(k) for k in (*carry, *xs)]
    return _planned(eqn, values, [body], requests, [*carry, *body.outs[ncar:]])


#: By construct; see `jmp_train._jaxpr.bodies`.
PLANS_OF_BODIES: dict[str, Callable[..., OpPlan]] = {
    "jit": plan_once,
    "remat": plan_remat,
    "call": plan_once,
    "custom_jvp": plan_unrounded,
    "custom_vjp": plan_unrounded,
    "shard_map": plan_unrounded,
    "cond": plan_cond,
    "while": plan_while,
    "scan": plan_scan,
}


def _as_is(kind: Kind | None) -> Requests:
    return {kind.base: True} if kind else {}


def _certain(requests: Requests) -> Requests:
    return dict.fromkeys(requests, True)


def _settled(kind: Kind | None, requests: Requests) -> Requests:
    """Return certain requests alone, else also the array as it is, to be cast inside."""
    return requests if requests and all(requests.values()) else {**_as_is(kind), **requests}


def _not_widened(kind: Kind | None, requests: Requests) -> Requests:
    """Return the array as it is in place of requests that widen it."""
    if kind is None:
        return requests
    narrow = {d: c for d, c in requests.items() if d.itemsize <= kind.base.itemsize}
    return narrow if len(narrow) == len(requests) else {**narrow, **_as_is(kind)}


def _uncertain(kind: Kind | None, requests: Requests) -> Requests:
    return {**dict.fromkeys(requests, False), **_as_is(kind)}
