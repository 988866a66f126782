"""Re-emits a planned jaxpr: every operation again, on operands in the dtypes that the plan gives.

A value keeps each dtype that it has been cast to, so one array is cast to one dtype once. Bodies
are traced anew and their equations bound with the parameters that they had, so names, donation,
sharding, unrolling and checkpoint policies stay.

A weight that a scan reads in half precision goes in twice: rounded once outside, as a constant
without a gradient, and as it is, for the gradient alone (`_held`). So the cast is not repeated,
and yet the loop adds its gradient up in the weight's own dtype; XLA drops what is not read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Literal

from jmp_train._autocast.plan import CALL, JIT, REMAT, Kind, OpPlan, Plan, Planner, kind_of_aval
from jmp_train._jaxpr import compat


@jax.custom_jvp
def _held(source: Any, copy: Any) -> Any:
    """`copy`, which is `source` in another dtype; its gradient is that of the cast of `source`."""
    del source
    return copy


@_held.defjvp
def _held_jvp(primals: Any, tangents: Any) -> Any:
    copy = primals[1]
    return copy, lax.convert_element_type(tangents[0], copy.dtype)


class Arrays:
    """One array, in every dtype that it has been asked for.

    `base` is the dtype of the narrowest array that is exact; `copies` came from outside the loop
    and carry no gradient.
    """

    __slots__ = ("base", "by_dtype", "copies")

    def __init__(self, base: np.dtype, by_dtype: dict[np.dtype, Any], copies: Any = ()):
        self.base = base
        self.by_dtype = by_dtype
        self.copies: dict[np.dtype, Any] = dict(copies)

    def has(self, dtype: np.dtype) -> bool:
        return dtype in self.by_dtype or dtype in self.copies

    def get(self, dtype: np.dtype) -> Any:
        if dtype not in self.by_dtype:
            source = self.by_dtype[self.base]
            if dtype in self.copies:
                self.by_dtype[dtype] = _held(source, self.copies[dtype])
            else:
                self.by_dtype[dtype] = _cast(source, dtype)
        return self.by_dtype[dtype]

    def copy(self, dtype: np.dtype) -> Any:
        """The array in `dtype`, to be handed into a loop without its gradient."""
        if dtype not in self.copies:
            self.copies[dtype] = lax.stop_gradient(self.get(dtype))
        return self.copies[dtype]


def _cast(x: Any, dtype: np.dtype) -> Any:
    if not isinstance(x, jax.Array) and np.ndim(x) == 0:
        return np.asarray(x).astype(dtype)  # a literal stays one
    return lax.convert_element_type(x, dtype)


class Value:
    """A floating value of the program: its kind, and its arrays."""

    __slots__ = ("arrays", "kind")

    def __init__(self, kind: Kind, arrays: Arrays):
        self.kind = kind
        self.arrays = arrays

    def get(self, dtype: np.dtype) -> Any:
        return self.arrays.get(dtype)


def value_of(kind: Kind | None, x: Any) -> Any:
    """A `Value` whose one array is x, in its base dtype; x itself where it is not floating."""
    if kind is None:
        return x
    x = x if x.dtype == kind.base else _cast(x, kind.base)
    return Value(kind, Arrays(kind.base, {kind.base: x}))


def based(value: Any) -> Any:
    """The array that holds a value exactly, to be handed on."""
    return value.get(value.kind.base) if isinstance(value, Value) else value


class Parcel:
    """Operands of a body, flattened: each value in one or several dtypes.

    Args:
      values: what the body is handed.
      asks: per value, the dtypes that it is wanted in and whether for certain; one that is not is
        added where the array has been made already.
      copies: whether all but the base dtype go in as copies without a gradient.
    """

    def __init__(self, values: Sequence[Any], asks: Sequence[Any], copies: bool = False):
        self.args: list[Any] = []
        self.slots: list[tuple[Kind, tuple[np.dtype, ...]] | None] = []
        self.copies = copies
        for value, ask in zip(values, asks, strict=True):
            if not isinstance(value, Value):
                self.args.append(value)
                self.slots.append(None)
                continue
            dtypes = self._dtypes(value, ask)
            base = value.kind.base
            get = value.arrays.copy if copies else value.get
            self.args += [value.get(d) if d == base else get(d) for d in dtypes]
            self.slots.append((value.kind, dtypes))

    def _dtypes(self, value: Value, ask: Any) -> tuple[np.dtype, ...]:
        dtypes = [d for d, certain in ask.items() if certain]
        if not dtypes or self.copies:  # a copy needs what its gradient goes to
            dtypes = list(dict.fromkeys([value.kind.base, *dtypes]))
        dtypes += [d for d in ask if d not in dtypes and value.arrays.has(d)]
        return tuple(dtypes)

    def open(self, args: Sequence[Any]) -> list[Any]:
        """The values again, from the arguments that the body received."""
        rest, values = iter(args), []
        for slot in self.slots:
            if slot is None:
                values.append(next(rest))
                continue
            kind, dtypes = slot
            got = {d: next(rest) for d in dtypes}
            if self.copies:
                own = {kind.base: got.pop(kind.base)}
                values.append(Value(kind, Arrays(kind.base, own, got)))
            else:
                base = kind.base if kind.base in got else dtypes[0]
                values.append(Value(kind, Arrays(base, got)))
        return values

    def spread(self, per_value: Sequence[Any], extra: Callable[[Any], Any]) -> tuple[Any, ...]:
        """A parameter with an entry per operand, with entries for the copies too."""
        spread: list[Any] = []
        for slot, entry in zip(self.slots, per_value, strict=True):
            if slot is None:
                spread.append(entry)
            else:
                kind, dtypes = slot
                spread += [entry if d == kind.base else extra(entry) for d in dtypes]
        return tuple(spread)

    def firsts(self) -> list[int]:
        """The index of each operand's first argument."""
        sizes = [1 if slot is None else len(slot[1]) for slot in self.slots]
        return [sum(sizes[:i]) for i in range(len(sizes))]

    @property
    def key(self) -> Any:
        return (tuple(self.slots), self.copies)


def _same(entry: Any) -> Any:
    return entry


class Together:
    """Parcels one after the other."""

    def __init__(self, *parcels: Parcel):
        self.parcels = parcels

    def open(self, args: Sequence[Any]) -> list[Any]:
        values, start = [], 0
        for parcel in self.parcels:
            values += parcel.open(args[start : start + len(parcel.args)])
            start += len(parcel.args)
        return values

    @property
    def key(self) -> Any:
        return tuple(parcel.key for parcel in self.parcels)


def _kind(value: Any) -> Kind | None:
    return value.kind if isinstance(value, Value) else None


def _as_kind(value: Any, kind: Kind | None) -> Any:
    """The array of a value in a kind's base dtype; an array that is not floating as it is."""
    return value.get(kind.base) if kind and isinstance(value, Value) else based(value)


def _as_dtype(value: Any, dtype: Any) -> Any:
    return value.get(np.dtype(dtype)) if isinstance(value, Value) else value


def _carried(values: Sequence[Any], kinds: Sequence[Kind | None]) -> tuple[list[Any], list[Any]]:
    """The first carries of a loop and what is asked of them: the dtypes that they keep."""
    carried = [value_of(k, _as_kind(v, k)) for v, k in zip(values, kinds, strict=True)]
    return carried, [{k.base: True} if k else {} for k in kinds]


_SCATTERS = {
    "scatter": lax.scatter,
    "scatter-add": lax.scatter_add,
    "scatter-max": lax.scatter_max,
    "scatter-min": lax.scatter_min,
    "scatter-mul": lax.scatter_mul,
    "scatter-sub": lax.scatter_sub,
}


def _scatter(eqn: Any, operand: Any, indices: Any, updates: Any) -> Any:
    """A scatter in another dtype; its parameters hold a computation in the one it was traced in."""
    names = ("indices_are_sorted", "unique_indices", "mode")
    return _SCATTERS[eqn.primitive.name](
        operand,
        indices,
        updates,
        eqn.params["dimension_numbers"],
        **{name: eqn.params[name] for name in names},
    )


class Residual(NamedTuple):
    """What a `custom_vjp` rule keeps for its backward pass: how it is held, the dtype that the rule
    was written for, and whether it is a constant of the code."""

    kind: Kind | None
    dtype: Any
    constant: bool


class Emitter:
    """Runs plans. Traced bodies are kept, so a function called twice stays one function."""

    def __init__(self, planner: Planner):
        self.planner = planner
        self._traced: dict[Any, Any] = {}

    def run(self, plan: Plan, values: Sequence[Any]) -> list[Any]:
        """The values of a plan's outputs from those of its inputs."""
        body = plan.body
        env: dict[Any, Any] = {}
        for var, const in zip(body.constvars, body.consts, strict=True):
            env[var] = value_of(kind_of_aval(var.aval), const)
        env.update(zip(body.invars, values, strict=True))
        last = _last_uses(plan)

        def read(atom: Any) -> Any:
            if isinstance(atom, Literal):
                kind = kind_of_aval(atom.aval)
                return atom.val if kind is None else value_of(kind, atom.val)
            return env[atom]

        for i, op in enumerate(plan.ops):
            with compat.context_of(op.eqn):
                outs = self.op(op, [read(a) for a in op.eqn.invars])
            env.update(zip(op.eqn.outvars, outs, strict=True))
            for var in last.get(i, ()):
                env.pop(var, None)
        outs = []
        for atom, kind in zip(body.outvars, plan.outs, strict=True):
            value = read(atom)
            outs.append(Value(kind, value.arrays) if kind and isinstance(value, Value) else value)
        return outs

    def op(self, op: OpPlan, values: list[Any]) -> list[Any]:
        name = op.eqn.primitive.name
        if op.rule == "cast":
            return [self.author_cast(op, values[0])]
        if op.rule == "enter":
            return _ENTER[name](self, op, values)
        args = [
            v.get(d) if d and isinstance(v, Value) else based(v)
            for v, d in zip(values, op.wants, strict=True)
        ]
        if name in _SCATTERS and args[0].dtype != op.eqn.invars[0].aval.dtype:
            outs = [_scatter(op.eqn, *args)]
        else:
            outs = compat.bind(op.eqn.primitive, args, op.params or op.eqn.params)
        return [value_of(kind, out) for kind, out in zip(op.outs, outs, strict=True)]

    def author_cast(self, op: OpPlan, value: Any) -> Any:
        kind = op.outs[0]
        if kind and isinstance(value, Value) and op.wants[0] is None:
            return Value(kind, value.arrays)
        if kind and isinstance(value, Value):
            return value_of(kind, value.get(kind.native))
        arg = value.get(op.wants[0]) if op.wants[0] and isinstance(value, Value) else based(value)
        out = compat.bind(op.eqn.primitive, [arg], op.eqn.params)[0]
        return value_of(kind, out)

    def body(
        self, plan: Plan, parcel: Parcel | Together, outs: Sequence[Kind | None]
    ) -> Callable[..., Any]:
        """A function of a parcel's arguments that returns `outs`, each in its base dtype."""

        def run(*args: Any) -> Any:
            got = self.run(plan, parcel.open(args))
            return tuple(_as_kind(v, k) for v, k in zip(got, outs, strict=True))

        return run

    def traced(self, plan: Plan, parcel: Parcel | Together, avals: Sequence[Any], outs: Any) -> Any:
        key = (id(plan), parcel.key, tuple(avals), tuple(outs))
        if key not in self._traced:
            fun = self.body(plan, parcel, outs)
            name = compat.function_name(plan.body.jaxpr)
            self._traced[key] = (plan, compat.trace(fun, avals, name))
        return self._traced[key][1]

    # Operations with bodies.

    def call(self, op: OpPlan, values: list[Any]) -> list[Any]:
        return self.run(op.subs[0], values)

    def jit(self, op: OpPlan, values: list[Any]) -> list[Any]:
        parcel, params = Parcel(values, op.asks), dict(op.eqn.params)
        avals = [jax.typeof(a) for a in parcel.args]
        params["jaxpr"] = self.traced(op.subs[0], parcel, avals, op.outs)
        for name in ("in_shardings", "in_layouts"):
            if name in params:
                params[name] = parcel.spread(params[name], _same)
        if "donated_invars" in params:  # a cast copy is nobody's buffer to give away
            params["donated_invars"] = parcel.spread(params["donated_invars"], lambda _: False)
        return self.bound(op, parcel.args, params)

    def remat(self, op: OpPlan, values: list[Any]) -> list[Any]:
        parcel = Parcel(values, op.asks)
        closed = self.traced(op.subs[0], parcel, [jax.typeof(a) for a in parcel.args], op.outs)
        jaxpr, consts = compat.open_jaxpr(closed)
        return self.bound(op, [*consts, *parcel.args], {**op.eqn.params, "jaxpr": jaxpr})

    def cond(self, op: OpPlan, values: list[Any]) -> list[Any]:
        parcel = Parcel(values[1:], op.asks[1:])
        avals = [jax.typeof(a) for a in parcel.args]
        branches = tuple(self.traced(sub, parcel, avals, op.outs) for sub in op.subs)
        params = {**op.eqn.params, "branches": branches}
        return self.bound(op, [based(values[0]), *parcel.args], params)

    def while_loop(self, op: OpPlan, values: list[Any]) -> list[Any]:
        params = dict(op.eqn.params)
        nc, nb = params["cond_nconsts"], params["body_nconsts"]
        cond = Parcel(values[:nc], op.asks[:nc])
        body = Parcel(values[nc : nc + nb], op.asks[nc : nc + nb])
        carry = Parcel(*_carried(values[nc + nb :], op.outs))
        carried = [v.aval for v in op.eqn.outvars]
        params["cond_jaxpr"] = self.traced(
            op.subs[0], Together(cond, carry), [*map(jax.typeof, cond.args), *carried], [None]
        )
        params["body_jaxpr"] = self.traced(
            op.subs[1], Together(body, carry), [*map(jax.typeof, body.args), *carried], op.outs
        )
        params["cond_nconsts"], params["body_nconsts"] = len(cond.args), len(body.args)
        return self.bound(op, [*cond.args, *body.args, *carry.args], params)

    def scan(self, op: OpPlan, values: list[Any]) -> list[Any]:
        params = dict(op.eqn.params)
        nc, ncar = compat.scan_counts(params)
        consts = Parcel(values[:nc], op.asks[:nc], copies=True)
        carry = Parcel(*_carried(values[nc : nc + ncar], op.outs[:ncar]))
        xs = Parcel(values[nc + ncar :], op.asks[nc + ncar :])
        slices = [v.aval for v in compat.body_of(params["jaxpr"]).invars[nc + ncar :]]
        avals = [
            *map(jax.typeof, consts.args),
            *[v.aval for v in compat.body_of(params["jaxpr"]).invars[nc : nc + ncar]],
            *[compat.aval_like(a, x.dtype) for a, x in zip(slices, xs.args, strict=True)],
        ]
        parcel = Together(consts, carry, xs)
        params["jaxpr"] = self.traced(op.subs[0], parcel, avals, op.outs)
        params = compat.with_scan_consts(params, len(consts.args))
        if "linear" in params:
            linear = params["linear"]
            params["linear"] = (*consts.spread(linear[:nc], lambda _: False), *linear[nc:])
        return self.bound(op, [*consts.args, *carry.args, *xs.args], params)

    def shard_map(self, op: OpPlan, values: list[Any]) -> list[Any]:
        params = op.eqn.params
        parcel = Parcel(values, op.asks, copies=True)
        outs = jax.shard_map(
            self.body(op.subs[0], parcel, op.outs),
            mesh=params["mesh"],
            in_specs=parcel.spread(params["in_specs"], _same),
            out_specs=tuple(params["out_specs"]),
            axis_names=params["newly_manual_axes"],
            check_vma=params["check_vma"],
        )(*parcel.args)
        return [value_of(kind, out) for kind, out in zip(op.outs, outs, strict=True)]

    def bound(self, op: OpPlan, args: Sequence[Any], params: dict[str, Any]) -> list[Any]:
        outs = compat.bind(op.eqn.primitive, args, params)
        return [value_of(kind, out) for kind, out in zip(op.outs, outs, strict=True)]

    # Functions with derivative rules of their own. The rules run under the same autocast.

    def custom_jvp(self, op: OpPlan, values: list[Any]) -> list[Any]:
        params, parcel = op.eqn.params, Parcel(values, op.asks, copies=True)
        symbolic = params["symbolic_zeros"]
        first, skip = parcel.firsts(), params["num_consts"]
        kinds = [_kind(v) for v in values[skip:]]

        def rule(primals: Any, tangents: Any) -> Any:
            tangents = [tangents[i] for i in first[skip:]]
            zeros = [symbolic and compat.is_symbolic_zero(t) for t in tangents]
            body, out_zeros = compat.jvp_rule(params, zeros)
            tangents = [t for t, zero in zip(tangents, zeros, strict=True) if not zero]
            tangent_kinds = [kind_of_aval(jax.typeof(t)) for t in tangents]
            plan = self.planner.plan(body, [*kinds, *tangent_kinds], op.subs[0].region)
            given = [value_of(k, t) for k, t in zip(tangent_kinds, tangents, strict=True)]
            outs = self.run(plan, [*parcel.open(primals)[skip:], *given])
            n = len(op.outs)
            primals_out = [_as_kind(v, k) for v, k in zip(outs[:n], op.outs, strict=True)]
            rest = iter(outs[n:])
            return primals_out, [
                SymbolicZero(jax.typeof(p).to_tangent_aval()) if zero else _as_kind(next(rest), k)
                for p, k, zero in zip(primals_out, op.outs, out_zeros, strict=True)
            ]

        fun = self._named(op, lambda *args: list(self.body(op.subs[0], parcel, op.outs)(*args)))
        custom = jax.custom_jvp(fun)
        custom.defjvp(rule, symbolic_zeros=symbolic)
        outs = custom(*parcel.args)
        return [value_of(kind, out) for kind, out in zip(op.outs, outs, strict=True)]

    def custom_vjp(self, op: OpPlan, values: list[Any]) -> list[Any]:
        params, parcel = op.eqn.params, Parcel(values, op.asks, copies=True)
        symbolic, skip = params["symbolic_zeros"], params["num_consts"]
        first = parcel.firsts()
        held: list[Residual] = []

        def forward(*args: Any) -> Any:
            nonzeros = [args[i].perturbed if symbolic else True for i in first[skip:]]
            args = tuple(a.value for a in args) if symbolic else args
            given = parcel.open(args)
            rule = compat.vjp_rule(params, nonzeros)
            ins = [_kind(v) for v in given[skip:]]
            plan = self.planner.plan(rule.forward, ins, op.subs[0].region)
            outs = self.run(plan, given[skip:])
            split = len(outs) - len(op.outs)
            made = iter(zip(outs, rule.forward.outvars, strict=True))
            residuals: list[Any] = []
            held.clear()
            for i in rule.inputs:
                value, atom = next(made) if i is None else (given[i], op.eqn.invars[i])
                constant = rule.forward.is_constant(atom) if i is None else op.constant[i]
                residuals.append(based(value))
                held.append(Residual(_kind(value), atom.aval.dtype, constant))
            shown = [_as_kind(v, k) for v, k in zip(outs[split:], op.outs, strict=True)]
            return shown, residuals

        def backward(residuals: Any, cotangents: Any) -> Any:
            cts, logs = self._backward(op, held, residuals, cotangents)
            back: list[Any] = [None] * len(parcel.args)
            for i, ct in zip(first[skip:], cts, strict=True):
                back[i] = ct if ct is None else _as_dtype(ct, jax.typeof(parcel.args[i]).dtype)
            return tuple(back), logs

        fun = self._named(op, lambda *args: list(self.body(op.subs[0], parcel, op.outs)(*args)))
        custom = jax.custom_vjp(fun)
        compat.define_vjp(custom, forward, backward, symbolic)
        outs = custom(*parcel.args)
        return [value_of(kind, out) for kind, out in zip(op.outs, outs, strict=True)]

    def _backward(
        self,
        op: OpPlan,
        held: Sequence[Residual],
        residuals: Sequence[Any],
        cotangents: Sequence[Any],
    ) -> tuple[list[Any], dict[str, Any] | None]:
        """Runs the user's backward rule, traced in the dtypes that it was written for; returns the
        cotangents, None for a zero, and what the rule logs, in the dtypes that it was written in."""
        params, total = op.eqn.params, len(held) + len(cotangents)
        static: dict[
            int, Any
        ] = {}  # zeros, which hold no array, and constants, which rules may read
        values, avals = [], []
        for i, (residual, x) in enumerate(zip(held, residuals, strict=True)):
            if residual.constant and not isinstance(x, Tracer):
                static[i] = x
            else:
                values.append(value_of(residual.kind, x))
                avals.append(compat.aval_like(jax.typeof(x), residual.dtype))
        for i, (ct, var) in enumerate(zip(cotangents, op.eqn.outvars, strict=True), len(held)):
            if compat.is_symbolic_zero(ct):
                aval = compat.aval_like(ct.aval, var.aval.to_tangent_aval().dtype)
                static[i] = SymbolicZero(aval)
            elif ct.dtype == jax.dtypes.float0:
                static[i] = ct
            else:
                values.append(value_of(kind_of_aval(jax.typeof(ct)), ct))
                avals.append(compat.aval_like(jax.typeof(ct), var.aval.dtype))
        zero: list[bool] = []
        logged: list[Any] = []  # the structure of the logs

        def written_rule(*args: Any) -> Any:
            rest = iter(args)
            args = tuple(static[i] if i in static else next(rest) for i in range(total))
            outs, logs = compat.run_backward(params, args)
            zero[:] = [out is None or compat.is_symbolic_zero(out) for out in outs]
            leaves, tree = jax.tree.flatten(logs)
            logged[:] = [tree]
            return [
                *[out for out, is_zero in zip(outs, zero, strict=True) if not is_zero],
                *leaves,
            ]

        closed = compat.trace(written_rule, avals)
        plan = self.planner.plan(closed, [_kind(v) for v in values], op.subs[0].region)
        outs = iter(self.run(plan, values))
        cts = [None if is_zero else next(outs) for is_zero in zero]
        (tree,) = logged
        log_avals = closed.out_avals[len(closed.out_avals) - tree.num_leaves :]
        logs = [_as_dtype(v, a.dtype) for v, a in zip(outs, log_avals, strict=True)]
        return cts, jax.tree.unflatten(tree, logs)

    def _named(self, op: OpPlan, fun: Any) -> Any:
        name = compat.function_name(op.eqn.params["call_jaxpr"])
        if name:
            fun.__name__ = fun.__qualname__ = name
        return fun


def _last_uses(plan: Plan) -> dict[int, list[Any]]:
    """The variables that no equation after the i-th reads."""
    last: dict[Any, int] = {}
    for i, op in enumerate(plan.ops):
        for atom in (*op.eqn.invars, *op.eqn.outvars):
            if not isinstance(atom, Literal):
                last[atom] = i
    for atom in plan.body.outvars:
        if not isinstance(atom, Literal):
            last.pop(atom, None)
    by_op: dict[int, list[Any]] = {}
    for var, i in last.items():
        by_op.setdefault(i, []).append(var)
    return by_op


_ENTER: dict[str, Any] = {
    **dict.fromkeys(JIT, Emitter.jit),
    **dict.fromkeys(REMAT, Emitter.remat),
    **dict.fromkeys(CALL, Emitter.call),
    "cond": Emitter.cond,
    "while": Emitter.while_loop,
    "scan": Emitter.scan,
    "shard_map": Emitter.shard_map,
    "custom_jvp_call": Emitter.custom_jvp,
    "custom_vjp_call": Emitter.custom_vjp,
}
