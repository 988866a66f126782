"""Plans operations without bodies: each by the list that its primitive is in."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmp_train._autocast.kinds import (
    FLOAT32,
    HALF,
    Kind,
    computed_dtype,
    kind_of_aval,
    native_dtype,
    promote,
    widest,
    written,
)
from jmp_train._autocast.op_rules import (
    BINARY,
    INDEPENDENT,
    LAYOUT,
    LINEAR,
    LOGS,
    MOVES,
    POWERS,
    OpRules,
)
from jmp_train._autocast.plans import OpPlan
from jmp_train._autocast.regions import MarkedRegion
from jmp_train._jaxpr.compat import Equation
from jmp_train.numerics.dtypes import is_floating


@dataclasses.dataclass(frozen=True)
class Operation:
    """An equation and the kinds of its operands; its methods plan it under each of the rules."""

    eqn: Equation
    kinds: Sequence[Kind | None]

    def plan(
        self, rules: OpRules, compute: np.dtype, region: MarkedRegion | None, raised: bool
    ) -> OpPlan:
        """Return the plan under the rule that applies; `raised` forms a sum in float32."""
        op = self._under_rule(rules, compute, region, raised)
        op.outs = _with_values(self.eqn, self.kinds, op.outs)
        return op

    def _under_rule(
        self, rules: OpRules, compute: np.dtype, region: MarkedRegion | None, raised: bool
    ) -> OpPlan:
        name = self.eqn.primitive.name
        if region is not None and not region.lists:
            listed = name in rules.compute or name in rules.float32 or name in rules.promote
            return self.in_region(region.dtype) if listed else self.as_written("region")
        if name in rules.compute:
            return self.in_compute(region.dtype if region else compute)
        if name in rules.float32:
            return self.in_float32()
        if name in rules.promote:
            return self.in_widest(region, raised=raised)
        return self.as_written("as written", "in no list")

    def as_written(self, rule: str, note: str = "") -> OpPlan:
        """Run on operands in the dtypes that the equation was traced with."""
        dtypes = [native_dtype(kind_of_aval(atom.aval)) for atom in self.eqn.invars]
        outs = [kind_of_aval(var.aval) for var in self.eqn.outvars]
        ran = promote([d for d in dtypes if d] or [k.native for k in outs if k] or [FLOAT32])
        touched = any(dtypes) or any(outs)
        return OpPlan(self.eqn, rule, ran if touched else None, dtypes, outs, note)

    def all_in(self, dtype: np.dtype, rule: str, note: str = "") -> OpPlan:
        """Run on operands in one dtype; results that the author had in their dtype follow."""
        before = {native_dtype(kind_of_aval(atom.aval)) for atom in self.eqn.invars} - {None}
        dtypes = [dtype if kind else None for kind in self.kinds]
        outs: list[Kind | None] = []
        for var in self.eqn.outvars:
            kind = kind_of_aval(var.aval)
            outs.append(written(dtype) if kind and kind.native in before else kind)
        return OpPlan(self.eqn, rule, dtype if before else None, dtypes, outs, note)

    def in_region(self, region: np.dtype) -> OpPlan:
        """Run in the region's dtype where written in float32, else as written."""
        before = {native_dtype(kind_of_aval(atom.aval)) for atom in self.eqn.invars} - {None}
        if region == FLOAT32 or before != {FLOAT32}:
            return self.as_written("region")
        op = self.all_in(region, "region")
        return _with_result(op, region)

    def in_compute(self, compute: np.dtype) -> OpPlan:
        before = [kind_of_aval(atom.aval) for atom in self.eqn.invars]
        dtypes = {k.native for k in before if k}
        if not dtypes or _complex(self.eqn):
            return self.as_written("as written", "not real floating")
        if not dtypes <= {FLOAT32, *HALF}:
            return self.as_written("as written", "float64 or an 8-bit format")
        if FLOAT32 not in dtypes:
            return self.as_written("as written", "half in the author's code")
        if asks_for_precision(self.eqn.params.get("precision")):
            return self.as_written("as written", "the author's precision=")
        if note := _sum_of(self.eqn, self.kinds):
            return self.all_in(FLOAT32, "float32", note)
        op = _with_result(self.all_in(compute, "compute"), compute)
        features = _features(self.eqn, self.kinds)
        op.outs = [k and dataclasses.replace(k, features=features) for k in op.outs]
        return op

    def in_float32(self) -> OpPlan:
        natives = [k.native for k in self.kinds if k]
        if not natives or _complex(self.eqn):
            return self.as_written("as written", "not real floating")
        wide = any(d.itemsize > 4 for d in natives)
        return self.all_in(np.dtype(np.float64) if wide else FLOAT32, "float32")

    def in_widest(self, region: MarkedRegion | None, raised: bool) -> OpPlan:
        if _complex(self.eqn):
            return self.as_written("as written", "not real floating")
        name = self.eqn.primitive.name
        if name in INDEPENDENT and len(self.eqn.invars) == len(self.eqn.outvars):
            kinds = self.kinds
            ran = promote([k.base for k in kinds if k]) if any(kinds) else None
            return OpPlan(self.eqn, "promote", ran, [k and k.base for k in kinds], list(kinds))
        if raised:
            return self.all_in(FLOAT32, "promote", "float32 operations alone read it")
        kinds = [k for k in self.kinds if k]
        native = widest(kinds)
        if native is None:
            return self.as_written("as written" if kinds else "promote")
        if name in POWERS and native == np.float16:
            return self.all_in(FLOAT32, "promote", "float16 cannot hold 256**2")
        note = ""
        if region is not None and region.dtype == computed_dtype(kinds) != native:
            native, note = region.dtype, "stored arrays follow"
        if name in ("add", "sub") and len(kinds) == 2:
            return self.sum(kinds, native, note)
        if name in MOVES and not note:
            return self.moved(kinds, native)
        return self.all_in(native, "promote", note)

    def sum(self, kinds: Sequence[Kind], native: np.dtype, note: str) -> OpPlan:
        """Add two arrays; the sum of a product and its bias stays in half.

        torch's `linear` and convolutions take their bias along. The sum itself is formed in
        float32, so the gradient of the bias is summed in float32 too.
        """
        for product, bias in (kinds, kinds[::-1]):
            if (
                product.native in HALF
                and bias.native == FLOAT32
                and bias.input_size in product.features
            ):
                note = f"a product's bias, the sum kept in {product.native.name}"
                op = self.all_in(FLOAT32, "promote", note)
                op.outs = [written(product.native)]
                return op
        op = self.all_in(native, "promote", note)
        features = kinds[0].features & kinds[1].features
        op.outs = [k and dataclasses.replace(k, features=features) for k in op.outs]
        return op

    def moved(self, kinds: Sequence[Kind], native: np.dtype) -> OpPlan:
        """Run in the narrowest dtype that represents every operand exactly."""
        strong = [k for k in kinds if k.formats is None]
        base = promote([k.base for k in strong or kinds])
        if base is None or (strong and len(strong) < len(kinds) and base != native):
            base = native  # a literal is rounded to `native` at most
        op = self.all_in(base, "promote")
        formats = frozenset.intersection(*[k.formats or frozenset() for k in kinds])
        formats = None if strong else formats
        moved = Kind(native, base, formats)
        if self.eqn.primitive.name in LAYOUT and len(kinds) == 1:
            input_size, size = kinds[0].input_size, math.prod(self.eqn.outvars[0].aval.shape)
            input_size = None if input_size is None else min(input_size, size)
            moved = dataclasses.replace(moved, input_size=input_size, features=kinds[0].features)
        op.outs = [moved if k == written(base) else k for k in op.outs]
        return op


def _complex(eqn: Equation) -> bool:
    dtypes = (getattr(a.aval, "dtype", np.dtype(bool)) for a in (*eqn.invars, *eqn.outvars))
    return any(jnp.issubdtype(d, np.complexfloating) for d in dtypes)


def _features(eqn: Equation, kinds: Sequence[Kind | None]) -> frozenset[int]:
    """Return how many elements the bias of a product has.

    As many as its weight has output features, times the batch where the weight is batched.
    """
    sizes: set[int] = set()
    if (
        eqn.primitive.name == "conv_general_dilated"
        and kinds[1]
        and kinds[1].input_size is not None
    ):
        spec = eqn.params["dimension_numbers"].rhs_spec
        sizes.add(eqn.invars[1].aval.shape[spec[0]])
    if eqn.primitive.name == "dot_general":
        contracted, batched = eqn.params["dimension_numbers"]
        for i, kind in enumerate(kinds):
            if kind and kind.input_size is not None:
                shape = eqn.invars[i].aval.shape
                batch = math.prod(shape[d] for d in batched[i])
                inner = math.prod(shape[d] for d in contracted[i])
                whole = math.prod(shape) // max(inner, 1)
                sizes |= {whole, whole // max(batch, 1)}
    return frozenset(sizes)


def _with_values(
    eqn: Equation, kinds: Sequence[Kind | None], outs: Sequence[Kind | None]
) -> list[Kind | None]:
    """Return the kinds of results, marked where their values are 0 and 1 or logarithms."""
    name, known = eqn.primitive.name, [k for k in kinds if k]
    binary = name in BINARY and bool(known) and all(k.binary for k in known)
    logs = name in LOGS or (name in LINEAR and any(k.logs for k in known))
    if name in ("mul", "div"):  # by a number or a mask; weighted by an array, it is no logarithm
        logs = logs and all(k.logs or k.binary or k.formats is not None for k in known)
    if not (binary or logs):
        return list(outs)
    wide = (k and k.native not in HALF for k in outs)
    return [
        k and dataclasses.replace(k, binary=binary, logs=logs and bool(w))
        for k, w in zip(outs, wide, strict=True)
    ]


def _sum_of(eqn: Equation, kinds: Sequence[Kind | None]) -> str:
    """Return why a product is a sum, of float32 like `reduce_sum`; '' where it is a matrix product.

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


def asks_for_precision(precision: Any) -> bool:
    """Return whether the author asked for full precision: HIGHEST, or an algorithm with dtypes."""
    each = precision if isinstance(precision, tuple) else (precision,)
    lax = jax.lax
    named = (lax.DotAlgorithm, lax.DotAlgorithmPreset)
    return any(p == lax.Precision.HIGHEST or isinstance(p, named) for p in each)


def _with_result(op: OpPlan, dtype: np.dtype) -> OpPlan:
    """Set the result dtype that a contraction asks for. `jnp` always asks for the operands', so
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
