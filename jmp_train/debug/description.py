"""Describes the operations that a replay found: kind, place in the model, source line, operands."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmp_train._autocast.regions import module_path
from jmp_train._jaxpr import compat
from jmp_train._jaxpr.source import user_line
from jmp_train.debug.report import NonFiniteOp, OperandRange, wider_dtype
from jmp_train.debug.values import Origin, ReplayedValue, has_nan
from jmp_train.numerics.dtypes import is_floating


def describe(origin: Origin, reaches: tuple[str, ...]) -> NonFiniteOp:
    """Return the description of an operation that made `reaches` non-finite."""
    eqn, out, place = origin.eqn, origin.out, origin.place
    wide = _in_wider(origin)
    kind = "overflow" if wide is not None else "nan" if has_nan(out) else "inf"
    stack = place.stack_of(eqn)
    backward = "transpose(" in stack and "rematted_computation" not in stack
    operands = tuple(
        _operand_range(x) for x in origin.operands if is_floating(jnp.asarray(x.array).dtype)
    )
    return NonFiniteOp(
        op=eqn.primitive.name,
        kind=kind,
        dtype=out.dtype.name,
        shape=tuple(out.shape),
        count=int((~np.isfinite(np.asarray(out))).sum()),
        backward=backward,
        module=_module(stack, operands, reaches if backward else (), origin.after),
        path="/".join(place.path),
        source=user_line(eqn, place.callers),
        operands=operands,
        wide=wide,
        reaches=reaches,
    )


def _operand_range(x: ReplayedValue) -> OperandRange:
    array = jnp.asarray(x.array)
    values = np.asarray(array, np.float64)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (np.nan, np.nan)
    infinities, nans = int(np.isinf(values).sum()), int(np.isnan(values).sum())
    return OperandRange(array.dtype.name, float(low), float(high), x.argument, infinities, nans)


def _module(
    stack: str, operands: Iterable[OperandRange], reaches: tuple[str, ...], after: str
) -> str:
    scope = module_path(stack)
    read = [o.argument for o in operands if o.argument]
    if scope:
        return scope
    if read:
        return read[-1]
    if len(reaches) == 1:
        return reaches[0]
    return f"after {after}" if after else ""


def _is_jaxpr(parameter: Any) -> bool:
    return hasattr(parameter, "eqns") or hasattr(parameter, "jaxpr")


def _in_wider(origin: Origin) -> float | None:
    """Return the largest magnitude of the result in a wider format; None if not finite there."""
    if not is_floating(origin.out.dtype):
        return None
    wide = wider_dtype(origin.out.dtype)
    params = dict(origin.eqn.params)
    if any(map(_is_jaxpr, jax.tree.leaves(params))):
        return None
    for name in ("preferred_element_type", "new_dtype", "dtype"):
        if params.get(name) is not None and is_floating(params[name]):
            params[name] = wide
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x.array) for x in origin.operands]
        arrays = [x.astype(wide) if is_floating(x.dtype) else x for x in arrays]
        try:
            out, *_ = compat.bind(origin.eqn.primitive, arrays, params)
        # Each primitive has its own error for a dtype that it does not take.
        except Exception:  # noqa: BLE001
            return None
        if out.dtype != wide or not bool(jnp.isfinite(out).all()):
            return None
        return float(jnp.abs(out).max())
