"""Decides, before anything is traced again, the dtype that every operation of a jaxpr runs in.

The decision needs dtypes alone, so a plan is made by one cheap walk. It says for each equation the
dtype of every operand, and for each input of a jaxpr the dtypes that its body will ask for: that
is how a scan learns to cast a weight outside. Plans of the bodies of `scan`, `jit` and the others
are kept by what comes in, so a function called twice is planned once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Literal

from jmp_train._autocast.op_rules import (
    BINARY,
    INDEPENDENT,
    LAYOUT,
    LINEAR,
    LOGS,
    MOVES,
    POWERS,
    RAISED,
    OpRules,
)
from jmp_train._jaxpr.compat import Body, body_of, scan_counts
from jmp_train.numerics.dtypes import is_floating

FLOAT32 = np.dtype(np.float32)
HALF = (np.dtype(np.float16), np.dtype(jnp.bfloat16))
JIT = ("jit", "pjit")
REMAT = ("remat", "remat2", "checkpoint")
CALL = ("call", "closed_call")
CUSTOM = ("custom_jvp_call", "custom_vjp_call")


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a floating value of the program is held.

    Attributes:
      native: the dtype that it counts as where dtypes are promoted.
      base: the narrowest dtype that holds it exactly; an array of it exists.
      fits: for a literal, the 16-bit dtypes whose range holds it. A literal adapts to the dtype of
        the other operands, as a Python number does, where it fits. None for any other value.
      stored: for an input of the program, at most moved since: its number of elements, before any
        broadcast. None for what was computed.
      features: for a product with a stored array, the numbers of elements that a bias of it has.
      binary: whether every element is 0 or 1, as in a mask or a one-hot.
      logs: whether it is linear in logarithms, as log-probabilities are.
    """

    native: np.dtype
    base: np.dtype
    fits: frozenset[str] | None = None
    stored: int | None = None
    features: frozenset[int] = frozenset()
    binary: bool = False
    logs: bool = False


def written(dtype: Any) -> Kind:
    """The kind of a value held as the author wrote it."""
    return Kind(np.dtype(dtype), np.dtype(dtype))


def kind_of_aval(aval: Any) -> Kind | None:
    """The kind of a floating array as written; None for what holds no real floating numbers."""
    dtype = getattr(aval, "dtype", None)
    if dtype is None or not isinstance(aval, ShapedArray) or not is_floating(dtype):
        return None
    return written(dtype)


def kind_of_input(aval: Any) -> Kind | None:
    """The kind of an array that comes from outside: a weight, a bias, a batch."""
    kind = kind_of_aval(aval)
    return kind and dataclasses.replace(kind, stored=math.prod(aval.shape))


Fits = frozenset[str]


def fits_of(literal: Any) -> Fits | None:
    """The 16-bit dtypes whose range holds a number in the code; None for an array or a boolean."""
    if np.shape(literal.val) or not jnp.issubdtype(literal.aval.dtype, np.number):
        return None
    if jnp.issubdtype(literal.aval.dtype, np.complexfloating):
        return None
    value = abs(float(np.asarray(literal.val).astype(np.float64)))
    exact = value == 0 or not np.isfinite(value)
    limits = ((d, float(jnp.finfo(d).tiny), float(jnp.finfo(d).max)) for d in HALF)
    return frozenset(d.name for d, least, most in limits if exact or least <= value <= most)


def kind_of_literal(literal: Any) -> Kind | None:
    kind, fits = kind_of_aval(literal.aval), fits_of(literal)
    binary = fits is not None and float(literal.val) in (0.0, 1.0)
    return kind and dataclasses.replace(kind, fits=fits, binary=binary)


@dataclasses.dataclass(eq=False)
class Cell:
    """What is asked of one array: each dtype that it is wanted in, and whether for certain."""

    wanted: dict[np.dtype, bool] = dataclasses.field(default_factory=dict)

    def want(self, dtype: np.dtype, certain: bool = True) -> None:
        self.wanted[dtype] = self.wanted.get(dtype, False) or certain


Wants = dict[np.dtype, bool]


class Region(NamedTuple):
    """The mark on a stretch of code: its dtype, and what it is the dtype of."""

    dtype: np.dtype
    lists: bool  # of the compute rule, the other rules as ever; else of all that was in float32


@dataclasses.dataclass
class OpPlan:
    """One equation: the rule that took it, the dtypes of its operands and results."""

    eqn: Any
    rule: str
    dtype: np.dtype | None  # what it runs in; None where no floating number is touched
    wants: list[np.dtype | None]  # per operand; None to pass it as it is
    outs: list[Kind | None]
    note: str = ""
    subs: tuple[Plan, ...] = ()
    asks: list[Wants] = dataclasses.field(default_factory=list)  # per operand, where entered
    params: dict[str, Any] | None = None  # in place of the equation's
    constant: list[bool] = dataclasses.field(
        default_factory=list
    )  # per operand of a derivative rule


@dataclasses.dataclass
class Plan:
    """A jaxpr with the dtypes that it will run in."""

    body: Body
    ins: list[Kind | None]
    ops: list[OpPlan]
    outs: list[Kind | None]
    asks: list[Wants]  # per input: the dtypes that the body asks for
    region: Region | None


def promote(dtypes: Iterable[np.dtype]) -> np.dtype | None:
    """The narrowest dtype that holds all of them; None where JAX knows none (8-bit formats)."""
    try:
        return functools.reduce(lambda a, b: np.dtype(jnp.promote_types(a, b)), dtypes)
    except (TypeError, ValueError):
        return None


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
        jaxpr: Any,
        ins: Sequence[Kind | None],
        region: Region | None = None,
        kept: int = 0,
        whole: Sequence[Fits | None] = (),
    ) -> Plan:
        """The plan of a jaxpr whose inputs are of the given kinds.

        `region` is that of an enclosing mark, None outside one; the first `kept`
        outputs will be handed back in the dtypes that they were written in; `whole` says which
        inputs are whole numbers of the code (the 0 of `jnp.where(x > 0, x, 0)`), see `Kind.fits`.
        """
        body = jaxpr if isinstance(jaxpr, Body) else body_of(jaxpr)
        key = (id(body.jaxpr), tuple(map(id, body.consts)), tuple(ins), region, kept, tuple(whole))
        if key not in self._plans:
            raised: set[int] = set()
            walk = _Walk(self, body, ins, region, kept, whole, raised)
            while more := walk.raisable():
                raised |= more
                walk = _Walk(self, body, ins, region, kept, whole, raised)
            self._plans[key] = walk.result  # which keeps the jaxpr, so that its id stays its own
        return self._plans[key]


class _Walk:
    """One walk over a jaxpr; `raised` holds the sums that float32 operations alone read."""

    def __init__(
        self,
        planner: Planner,
        body: Body,
        ins: Sequence[Kind | None],
        region: Region | None,
        kept: int,
        whole: Sequence[Fits | None],
        raised: set[int],
    ):
        self.planner = planner
        self.body = body
        self.rules = planner.rules
        self.raised = raised
        self.kinds: dict[Any, Kind | None] = {}
        self.cells: dict[Any, Cell] = {}
        self.whole: dict[Any, Fits | None] = dict(zip(body.invars, whole, strict=False))
        for var in body.constvars:
            self.define(var, kind_of_input(var.aval))
        for var, kind in zip(body.invars, ins, strict=True):
            self.define(var, kind)
        cells = [self.cells[v] for v in body.invars]
        ops = [self.op(i, eqn, region) for i, eqn in enumerate(body.eqns)]
        outs = [self.kind(atom) for atom in body.outvars]
        for i, (atom, kind) in enumerate(zip(body.outvars, outs, strict=True)):
            self.want(atom, _dtype(kind_of_aval(atom.aval)) if i < kept else kind and kind.base)
        self.result = Plan(body, list(ins), ops, outs, [c.wanted for c in cells], region)

    def define(self, var: Any, kind: Kind | None, cell: Cell | None = None) -> None:
        self.kinds[var] = kind
        self.cells[var] = cell or Cell()

    def kind(self, atom: Any) -> Kind | None:
        return kind_of_literal(atom) if isinstance(atom, Literal) else self.kinds[atom]

    def want(self, atom: Any, dtype: np.dtype | None, certain: bool = True) -> None:
        if dtype is not None and not isinstance(atom, Literal):
            self.cells[atom].want(dtype, certain)

    def raisable(self) -> set[int]:
        """The half-precision sums whose every reader asks for float32."""
        found = set()
        for i, op in enumerate(self.result.ops):
            if op.rule == "promote" and op.eqn.primitive.name in RAISED:
                var, kind = op.eqn.outvars[0], op.outs[0]
                if (
                    kind
                    and kind.base in HALF
                    and var.aval.dtype == FLOAT32
                    and set(self.cells[var].wanted) == {FLOAT32}
                ):
                    found.add(i)
        return found - self.raised

    def op(self, index: int, eqn: Any, region: Region | None) -> OpPlan:
        region = region_of(eqn, region)
        name = eqn.primitive.name
        cell = None
        if name == "convert_element_type":
            op, cell = self.author_cast(eqn)
        elif name in _ENTERED:
            op = _ENTERED[name](self, eqn, region)
        else:
            op = self.plain(index, eqn, region)
            op.outs = _traced_on(eqn, self.kinds_in(eqn.invars), op.outs)
        for atom, dtype in zip(eqn.invars, op.wants, strict=True):
            self.want(atom, dtype)
        for atom, ask in zip(eqn.invars, op.asks, strict=False):
            for dtype, certain in ask.items():
                self.want(atom, dtype, certain)
        for var, kind in zip(eqn.outvars, op.outs, strict=True):
            self.define(var, kind, cell)
        return op

    # Operations without a body.

    def plain(self, index: int, eqn: Any, region: Region | None) -> OpPlan:
        name, rules = eqn.primitive.name, self.rules
        if region is not None and not region.lists:
            listed = name in rules.compute or name in rules.float32 or name in rules.promote
            return self.in_region(eqn, region.dtype) if listed else self.as_written(eqn, "region")
        if name in rules.compute:
            return self.in_compute(eqn, region.dtype if region else self.planner.compute)
        if name in rules.float32:
            return self.in_float32(eqn)
        if name in rules.promote:
            return self.in_widest(eqn, region, raised=index in self.raised)
        return self.as_written(eqn, "as written", "in no list")

    def as_written(self, eqn: Any, rule: str, note: str = "") -> OpPlan:
        """Operands in the dtypes that the equation was traced with."""
        wants = [_dtype(kind_of_aval(atom.aval)) for atom in eqn.invars]
        outs = [kind_of_aval(var.aval) for var in eqn.outvars]
        ran = promote([d for d in wants if d] or [k.native for k in outs if k] or [FLOAT32])
        touched = any(wants) or any(outs)
        return OpPlan(eqn, rule, ran if touched else None, wants, outs, note)

    def all_in(self, eqn: Any, dtype: np.dtype, rule: str, note: str = "") -> OpPlan:
        """Operands in one dtype; results that the author had in the operands' dtype follow."""
        before = {_dtype(kind_of_aval(atom.aval)) for atom in eqn.invars} - {None}
        wants = [dtype if self.kind(atom) else None for atom in eqn.invars]
        outs: list[Kind | None] = []
        for var in eqn.outvars:
            kind = kind_of_aval(var.aval)
            outs.append(written(dtype) if kind and kind.native in before else kind)
        return OpPlan(eqn, rule, dtype if before else None, wants, outs, note)

    def in_region(self, eqn: Any, region: np.dtype) -> OpPlan:
        """What was written in float32 runs in the region's dtype, all else as written."""
        before = {_dtype(kind_of_aval(atom.aval)) for atom in eqn.invars} - {None}
        if region == FLOAT32 or before != {FLOAT32}:
            return self.as_written(eqn, "region")
        op = self.all_in(eqn, region, "region")
        return _with_result(op, region)

    def in_compute(self, eqn: Any, compute: np.dtype) -> OpPlan:
        before = [kind_of_aval(atom.aval) for atom in eqn.invars]
        dtypes = {k.native for k in before if k}
        if not dtypes or _complex(eqn):
            return self.as_written(eqn, "as written", "not real floating")
        if not dtypes <= {FLOAT32, *HALF}:
            return self.as_written(eqn, "as written", "float64 or an 8-bit format")
        if FLOAT32 not in dtypes:
            return self.as_written(eqn, "as written", "half in the author's code")
        if _asks_for_precision(eqn.params.get("precision")):
            return self.as_written(eqn, "as written", "the author's precision=")
        if note := _sum_of(eqn, self.kinds_in(eqn.invars)):
            return self.all_in(eqn, FLOAT32, "float32", note)
        op = _with_result(self.all_in(eqn, compute, "compute"), compute)
        features = _features(eqn, self.kinds_in(eqn.invars))
        op.outs = [k and dataclasses.replace(k, features=features) for k in op.outs]
        return op

    def in_float32(self, eqn: Any) -> OpPlan:
        natives = [k.native for k in map(self.kind, eqn.invars) if k]
        if not natives or _complex(eqn):
            return self.as_written(eqn, "as written", "not real floating")
        wide = any(d.itemsize > 4 for d in natives)
        return self.all_in(eqn, np.dtype(np.float64) if wide else FLOAT32, "float32")

    def in_widest(self, eqn: Any, region: Region | None, raised: bool) -> OpPlan:
        if _complex(eqn):
            return self.as_written(eqn, "as written", "not real floating")
        name = eqn.primitive.name
        if name in INDEPENDENT and len(eqn.invars) == len(eqn.outvars):
            kinds = [self.kind(atom) for atom in eqn.invars]
            ran = promote([k.base for k in kinds if k]) if any(kinds) else None
            return OpPlan(eqn, "promote", ran, [k and k.base for k in kinds], kinds)
        if raised:
            return self.all_in(eqn, FLOAT32, "promote", "float32 operations alone read it")
        kinds = [k for k in map(self.kind, eqn.invars) if k]
        native = _widest(kinds)
        if native is None:
            return self.as_written(eqn, "as written" if kinds else "promote")
        if name in POWERS and native == np.float16:
            return self.all_in(eqn, FLOAT32, "promote", "float16 cannot hold 256**2")
        note = ""
        if region is not None and region.dtype == _computed(kinds) != native:
            native, note = region.dtype, "stored arrays follow"
        if name in ("add", "sub") and len(kinds) == 2:
            return self.sum(eqn, kinds, native, note)
        if name in MOVES and not note:
            return self.moved(eqn, kinds, native)
        return self.all_in(eqn, native, "promote", note)

    def sum(self, eqn: Any, kinds: list[Kind], native: np.dtype, note: str) -> OpPlan:
        """A sum of two arrays; that of a product and its bias stays in half.

        torch's `linear` and convolutions take their bias along. The sum itself is formed in
        float32, so the gradient of the bias is summed up in float32 too.
        """
        for product, bias in (kinds, kinds[::-1]):
            if (
                product.native in HALF
                and bias.native == FLOAT32
                and bias.stored in product.features
            ):
                note = f"a product's bias, the sum kept in {product.native.name}"
                op = self.all_in(eqn, FLOAT32, "promote", note)
                op.outs = [written(product.native)]
                return op
        op = self.all_in(eqn, native, "promote", note)
        features = kinds[0].features & kinds[1].features
        op.outs = [k and dataclasses.replace(k, features=features) for k in op.outs]
        return op

    def moved(self, eqn: Any, kinds: list[Kind], native: np.dtype) -> OpPlan:
        """Runs in the narrowest dtype that holds every operand exactly."""
        strong = [k for k in kinds if k.fits is None]
        base = promote([k.base for k in strong or kinds])
        if base is None or (strong and len(strong) < len(kinds) and base != native):
            base = native  # a literal is rounded to `native` at most
        op = self.all_in(eqn, base, "promote")
        fits = None if strong else frozenset.intersection(*[k.fits or frozenset() for k in kinds])
        moved = Kind(native, base, fits)
        if eqn.primitive.name in LAYOUT and len(kinds) == 1:
            stored, size = kinds[0].stored, math.prod(eqn.outvars[0].aval.shape)
            stored = None if stored is None else min(stored, size)
            moved = dataclasses.replace(moved, stored=stored, features=kinds[0].features)
        op.outs = [moved if k == written(base) else k for k in op.outs]
        return op

    def author_cast(self, eqn: Any) -> tuple[OpPlan, Cell | None]:
        """A cast that the author wrote: a widening one keeps the narrow array at hand, so that
        casting back is free; a narrowing one is shared with autocast's own casts."""
        (atom,), (var,) = eqn.invars, eqn.outvars
        kind, new = self.kind(atom), kind_of_aval(var.aval)
        if kind is None or new is None:
            exact = (
                kind.base
                if kind and not jnp.issubdtype(var.aval.dtype, np.complexfloating)
                else _dtype(kind_of_aval(atom.aval))
            )
            if new is not None and kind is None:
                binary = atom.aval.dtype == np.bool_
                new = dataclasses.replace(new, fits=self.whole_number(atom), binary=binary)
            return OpPlan(eqn, "cast", new.native if new else None, [exact], [new]), None
        old = atom.aval.dtype
        if promote([old, new.native]) == new.native:
            native = promote([kind.native, new.native]) or new.native
            native = kind.native if _is_held(eqn) else native
            fits = kind.fits if old == new.native else None
            alias = None if isinstance(atom, Literal) else self.cells[atom]
            widened = dataclasses.replace(kind, native=native, fits=fits)
            return OpPlan(eqn, "cast", native, [None], [widened]), alias
        return OpPlan(eqn, "cast", new.native, [new.native], [new]), None

    # Operations with bodies. `asks` says which dtypes of an operand the body wants.

    def kinds_in(self, atoms: Iterable[Any]) -> list[Kind | None]:
        return [self.kind(atom) for atom in atoms]

    def whole_number(self, atom: Any) -> Fits | None:
        if isinstance(atom, Literal):
            return fits_of(atom) if kind_of_aval(atom.aval) is None else None
        return self.whole.get(atom)

    def entered(self, eqn: Any, subs: Sequence[Plan], asks: list[Wants], outs: Any) -> OpPlan:
        wants: list[np.dtype | None] = [None] * len(eqn.invars)
        return OpPlan(eqn, "enter", None, wants, list(outs), "", tuple(subs), asks)

    def jit(self, eqn: Any, region: Region | None) -> OpPlan:
        """One body, run once: it is handed its operands in the dtypes that it asks for."""
        body = eqn.params["call_jaxpr" if "call_jaxpr" in eqn.params else "jaxpr"]
        whole = [self.whole_number(atom) for atom in eqn.invars]
        sub = self.planner.plan(body, self.kinds_in(eqn.invars), region, whole=whole)
        asks = [_settled(k, ask) for k, ask in zip(sub.ins, sub.asks, strict=True)]
        return self.entered(eqn, [sub], asks, sub.outs)

    def wrapped(self, eqn: Any, region: Region | None) -> OpPlan:
        """A body whose operands are handed over unrounded: `shard_map` adds their gradients up
        over devices, `custom_vjp` rules may read them in float32."""
        body = eqn.params["call_jaxpr" if "call_jaxpr" in eqn.params else "jaxpr"]
        whole = [self.whole_number(atom) for atom in eqn.invars]
        sub = self.planner.plan(body, self.kinds_in(eqn.invars), region, whole=whole)
        asks = [_hopeful(k, ask) for k, ask in zip(sub.ins, sub.asks, strict=True)]
        op = self.entered(eqn, [sub], asks, sub.outs)
        op.constant = [self.body.is_constant(atom) for atom in eqn.invars]
        return op

    def cond(self, eqn: Any, region: Region | None) -> OpPlan:
        """A cast that every branch makes is made outside, any other inside its branch."""
        kinds = self.kinds_in(eqn.invars[1:])
        subs = [self.planner.plan(b, kinds, region) for b in eqn.params["branches"]]
        asks: list[Wants] = [{}]
        for i, kind in enumerate(kinds):
            each = [sub.asks[i] for sub in subs]
            dtypes = dict.fromkeys(d for ask in each for d in ask)
            joint = {d: all(ask.get(d, False) for ask in each) for d in dtypes}
            asks.append(_settled(kind, joint))
        outs = [_join(ks) for ks in zip(*(sub.outs for sub in subs), strict=True)]
        return self.entered(eqn, subs, asks, outs)

    def while_loop(self, eqn: Any, region: Region | None) -> OpPlan:
        """Carries keep their dtypes; constants are handed over in all the dtypes asked for."""
        nc, nb = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        carry = [kind_of_aval(v.aval) for v in eqn.outvars]
        consts = self.kinds_in(eqn.invars[: nc + nb])
        cond = self.planner.plan(eqn.params["cond_jaxpr"], consts[:nc] + carry, region)
        ins = consts[nc:] + carry
        body = self.planner.plan(eqn.params["body_jaxpr"], ins, region, len(carry))
        asks = [_certain(a) for a in (*cond.asks[:nc], *body.asks[:nb])]
        return self.entered(eqn, [cond, body], asks + [_as_is(k) for k in carry], carry)

    def scan(self, eqn: Any, region: Region | None) -> OpPlan:
        """As `while_loop`; scanned inputs are cast a slice at a time, inside."""
        nc, ncar = scan_counts(eqn.params)
        carry = [kind_of_aval(v.aval) for v in eqn.outvars[:ncar]]
        consts, xs = self.kinds_in(eqn.invars[:nc]), self.kinds_in(eqn.invars[nc + ncar :])
        sub = self.planner.plan(eqn.params["jaxpr"], [*consts, *carry, *xs], region, ncar)
        asks = [{**_as_is(k), **_certain(a)} for k, a in zip(consts, sub.asks, strict=False)]
        asks += [_as_is(k) for k in (*carry, *xs)]
        return self.entered(eqn, [sub], asks, [*carry, *sub.outs[ncar:]])


_ENTERED = {
    **dict.fromkeys((*JIT, *REMAT, *CALL), _Walk.jit),
    **dict.fromkeys((*CUSTOM, "shard_map"), _Walk.wrapped),
    "cond": _Walk.cond,
    "while": _Walk.while_loop,
    "scan": _Walk.scan,
}


def _dtype(kind: Kind | None) -> np.dtype | None:
    return kind and kind.native


def _as_is(kind: Kind | None) -> Wants:
    return {kind.base: True} if kind else {}


def _certain(ask: Wants) -> Wants:
    return dict.fromkeys(ask, True)


def _settled(kind: Kind | None, ask: Wants) -> Wants:
    """What is certain, and the array as it is where anything else may be made of it inside."""
    return ask if ask and all(ask.values()) else {**_as_is(kind), **ask}


def _hopeful(kind: Kind | None, ask: Wants) -> Wants:
    return {**dict.fromkeys(ask, False), **_as_is(kind)}


def _join(kinds: Sequence[Kind | None]) -> Kind | None:
    """The kind of a result that several branches may give."""
    known = [k for k in kinds if k]
    if not known:
        return None
    native = promote([k.native for k in known]) or known[0].native
    base = promote([k.base for k in known]) or known[0].base
    return Kind(native, base)


def _widest(kinds: Sequence[Kind]) -> np.dtype | None:
    """The dtype that operands promote to; a literal counts only where it does not fit."""
    strong = [k.native for k in kinds if k.fits is None]
    widest = promote(strong or [k.native for k in kinds]) if kinds else None
    if widest is not None and widest in HALF:
        too_small = [k for k in kinds if k.fits is not None and widest.name not in k.fits]
        return promote([widest, *[k.native for k in too_small]])
    return widest


def _computed(kinds: Sequence[Kind]) -> np.dtype | None:
    """What operands promote to, those that came from outside left out: in a model under a policy
    a weight that multiplies activations follows them."""
    kinds = [k for k in kinds if k.stored is None]
    dtype = _widest(kinds) if any(k.fits is None for k in kinds) else None
    return dtype if dtype in HALF else None


def _complex(eqn: Any) -> bool:
    dtypes = (getattr(a.aval, "dtype", np.dtype(bool)) for a in (*eqn.invars, *eqn.outvars))
    return any(jnp.issubdtype(d, np.complexfloating) for d in dtypes)


def _features(eqn: Any, kinds: Sequence[Kind | None]) -> frozenset[int]:
    """How many elements the bias of a product has: as many as its weight has output features,
    times the batch where the weight is batched."""
    sizes: set[int] = set()
    if eqn.primitive.name == "conv_general_dilated" and kinds[1] and kinds[1].stored is not None:
        spec = eqn.params["dimension_numbers"].rhs_spec
        sizes.add(eqn.invars[1].aval.shape[spec[0]])
    if eqn.primitive.name == "dot_general":
        contracted, batched = eqn.params["dimension_numbers"]
        for i, kind in enumerate(kinds):
            if kind and kind.stored is not None:
                shape = eqn.invars[i].aval.shape
                batch = math.prod(shape[d] for d in batched[i])
                inner = math.prod(shape[d] for d in contracted[i])
                whole = math.prod(shape) // max(inner, 1)
                sizes |= {whole, whole // max(batch, 1)}
    return frozenset(sizes)


def _traced_on(
    eqn: Any, kinds: Sequence[Kind | None], outs: Sequence[Kind | None]
) -> list[Kind | None]:
    """The kinds of results, with what the operands say of their values: 0 or 1, logarithms."""
    name, known = eqn.primitive.name, [k for k in kinds if k]
    binary = name in BINARY and bool(known) and all(k.binary for k in known)
    logs = name in LOGS or (name in LINEAR and any(k.logs for k in known))
    if name in ("mul", "div"):  # by a number or a mask; weighted by an array, it is no logarithm
        logs = logs and all(k.logs or k.binary or k.fits is not None for k in known)
    if not (binary or logs):
        return list(outs)
    wide = (k and k.native not in HALF for k in outs)
    return [
        k and dataclasses.replace(k, binary=binary, logs=logs and bool(w))
        for k, w in zip(outs, wide, strict=True)
    ]


def _sum_of(eqn: Any, kinds: Sequence[Kind | None]) -> str:
    """Why a product is a sum, of float32 like `reduce_sum`; '' where it is a matrix product.

    An inner product has no output dimension of its own: `sum(a * b)`, as losses spell it.
    A product of logarithms with 0 and 1 picks log-probabilities, which a float32 loss reads.
    """
    if eqn.primitive.name != "dot_general":
        return ""
    contracted, batched = eqn.params["dimension_numbers"]
    ranks = [len(c) + len(b) for c, b in zip(contracted, batched, strict=True)]
    if contracted[0] and ranks == [len(atom.aval.shape) for atom in eqn.invars]:
        return "an inner product is a sum"
    for one, other in (kinds, kinds[::-1]):
        if one and other and one.binary and other.logs:
            return "logarithms picked by 0 and 1"
    return ""


def _asks_for_precision(precision: Any) -> bool:
    """Whether the author named a full-precision product: HIGHEST, or an algorithm with dtypes."""
    each = precision if isinstance(precision, tuple) else (precision,)
    lax = jax.lax
    named = (lax.DotAlgorithm, lax.DotAlgorithmPreset)
    return any(p == lax.Precision.HIGHEST or isinstance(p, named) for p in each)


def _with_result(op: OpPlan, dtype: np.dtype) -> OpPlan:
    """Sets the result dtype that a contraction asks for. `jnp` always asks for the operands', so
    only one wider than the operands is the author's wish, and stays."""
    asked = op.eqn.params.get("preferred_element_type")
    if asked is None or not is_floating(asked):
        return op
    before = promote(k.native for k in map(kind_of_aval, (a.aval for a in op.eqn.invars)) if k)
    if before is not None and np.dtype(asked).itemsize > before.itemsize:
        op.outs = [written(asked) if k else None for k in op.outs]
        op.note = f"the author's preferred_element_type={np.dtype(asked).name}"
        return op
    op.params = {**op.eqn.params, "preferred_element_type": dtype}
    return op


# Regions. A name scope is what survives every transformation of JAX: jit, grad and vmap keep it.

_REGION = "with_precision."
_COMPUTE = "compute_in."
_INNER = "autocast."
_HELD = "held_in."


def region_name(dtype: np.dtype) -> str:
    return f"{_REGION}{dtype.name}"


def compute_name(dtype: np.dtype) -> str:
    return f"{_COMPUTE}{dtype.name}"


def inner_name(dtype: np.dtype) -> str:
    """The scope of an autocast: one outside it leaves it alone, so the inner one decides."""
    return f"{_INNER}{dtype.name}"


def held_name(dtype: np.dtype) -> str:
    return f"{_HELD}{dtype.name}"


@functools.lru_cache(maxsize=4096)
def _region_in(stack: str) -> Region | None:
    last, mark = max((stack.rfind(mark), mark) for mark in (_REGION, _COMPUTE, _INNER))
    if last < 0:
        return None
    if mark == _INNER:
        return Region(FLOAT32, lists=False)
    word = "".join(c if c.isalnum() or c == "_" else " " for c in stack[last + len(mark) :])
    return Region(np.dtype(getattr(jnp, word.split()[0])), lists=mark == _COMPUTE)


def region_of(eqn: Any, outer: Region | None) -> Region | None:
    """The innermost region that an equation was written in, `outer` where none."""
    return _region_in(str(eqn.source_info.name_stack)) or outer


def _is_held(eqn: Any) -> bool:
    return _HELD in str(eqn.source_info.name_stack)
