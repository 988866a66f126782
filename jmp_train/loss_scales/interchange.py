"""Conversion of a loss scale from and to plain Python numbers, and from a GradScaler's state."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from jmp_train.errors import nearest
from jmp_train.loss_scales.checks import check_scale
from jmp_train.loss_scales.states import DynamicLossScale, LossScale, NoOpLossScale, StaticLossScale
from jmp_train.types import PyTree

_NUMBER, _WHOLE, _YES_NO = "a number", "a whole number", "True or False"
_OR_NONE = " or None"

#: Entries that `loss_scale_to_dict` writes, and their types, by kind.
_ENTRIES = {
    "none": {},
    "static": {"loss_scale": _NUMBER},
    "dynamic": {
        "loss_scale": _NUMBER,
        "counter": _WHOLE,
        "period": _WHOLE,
        "factor": _NUMBER,
        "min_loss_scale": _NUMBER,
        "backoff_factor": _NUMBER + _OR_NONE,
        "max_loss_scale": _NUMBER + _OR_NONE,
        "hysteresis": _WHOLE,
        "hysteresis_left": _WHOLE + _OR_NONE,
        "consecutive_hysteresis": _YES_NO,
    },
}
_KINDS = {"none": NoOpLossScale, "static": StaticLossScale, "dynamic": DynamicLossScale}

#: Entries of `GradScaler.state_dict()`, and the fields of `DynamicLossScale` that they set.
_GRADSCALER_ENTRIES = {
    "scale": _NUMBER,
    "growth_factor": _NUMBER,
    "backoff_factor": _NUMBER,
    "growth_interval": _WHOLE,
    "_growth_tracker": _WHOLE,
}
_GRADSCALER_NAMES = {
    "loss_scale": "scale",
    "factor": "growth_factor",
    "backoff_factor": "backoff_factor",
    "period": "growth_interval",
    "counter": "_growth_tracker",
}


def loss_scale_to_dict(loss_scale: LossScale) -> dict[str, Any]:
    """Convert a loss scale, state and hyper-parameters, to plain Python numbers for JSON.

    Args:
      loss_scale: one of the three kinds, with concrete numbers, so outside jit.

    Returns:
      A dict with `kind` ("none", "static" or "dynamic") and the fields of that kind by name.

    Raises:
      TypeError: for a value that is not a loss scale.

    >>> loss_scale_to_dict(StaticLossScale(1024))
    {'kind': 'static', 'loss_scale': 1024.0}
    """
    kind = next((kind for kind, cls in _KINDS.items() if isinstance(loss_scale, cls)), None)
    if kind is None:
        names = ", ".join(cls.__name__ for cls in _KINDS.values())
        raise TypeError(f"{loss_scale!r} is not a loss scale; expected one of {names}")
    values = {name: getattr(loss_scale, name) for name in _ENTRIES[kind]}
    return {"kind": kind} | {name: _plain(value) for name, value in values.items()}


def loss_scale_from_dict(entries: dict[str, Any]) -> LossScale:
    """Construct the loss scale that `loss_scale_to_dict` converted; it continues bit for bit.

    Args:
      entries: the dict, from JSON for instance. The scale becomes float32.

    Raises:
      ValueError: for an unknown or missing key, and for a value of another type or outside its
        range; the message has the key.

    >>> state = DynamicLossScale(2.0**10, counter=7, hysteresis=2)
    >>> loss_scale_from_dict(loss_scale_to_dict(state)) == state
    True
    """
    kind = entries.get("kind") if isinstance(entries, dict) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        hint = ""
        if isinstance(entries, dict) and "_growth_tracker" in entries:
            hint = "; to convert a GradScaler's state, use loss_scale_from_gradscaler"
        raise ValueError(
            f"the kind of the loss scale is {kind!r}; expected 'none', 'static' or 'dynamic'{hint}"
        )
    values = {name: value for name, value in entries.items() if name != "kind"}
    _check_entries(values, _ENTRIES[kind], f"a loss scale of kind {kind!r}")
    loss_scale = _make(_KINDS[kind], values)
    with np.errstate(over="ignore"):  # StaticLossScale accepts 0, as in jmp
        check_scale(np.float32(loss_scale.loss_scale), "loss_scale")
    return loss_scale


def loss_scale_from_gradscaler(state_dict: dict[str, Any]) -> LossScale:
    """Construct the loss scale that continues from the state of a PyTorch `GradScaler`.

    Args:
      state_dict: result of `torch.amp.GradScaler.state_dict()`, plain numbers; PyTorch is not
        imported. The empty dict of a disabled scaler means no loss scaling.

    Returns:
      A `DynamicLossScale` with a minimum of 0, because GradScaler has no minimum, or a
      `NoOpLossScale`.

    Raises:
      ValueError: for an unknown or missing key, and for a value of another type or outside its
        range.

    >>> state = loss_scale_from_gradscaler({"scale": 512.0, "growth_factor": 2.0,
    ...     "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 1999})
    >>> float(state.adjust(True).loss_scale)
    1024.0
    """
    if state_dict == {}:
        return NoOpLossScale()
    _check_entries(state_dict, _GRADSCALER_ENTRIES, "a GradScaler's state")
    tracker, interval = state_dict["_growth_tracker"], state_dict["growth_interval"]
    if tracker >= interval >= 1:  # GradScaler would never grow; DynamicLossScale would at once
        raise ValueError(
            f"_growth_tracker is {tracker}; expected it below growth_interval, {interval}"
        )
    values = {ours: state_dict[theirs] for ours, theirs in _GRADSCALER_NAMES.items()}
    try:
        return _make(DynamicLossScale, values | {"min_loss_scale": 0.0})
    except ValueError as error:
        raise ValueError(rename(str(error), _GRADSCALER_NAMES)) from None


def rename(message: str, names: dict[str, str]) -> str:
    """Replace the names of fields in a message.

    >>> rename("period is 0; expected 1 to 9", {"period": "growth_interval"})
    'growth_interval is 0; expected 1 to 9'
    """
    return re.sub(r"\w+", lambda word: names.get(word[0], word[0]), message)


def _check_entries(values: PyTree, entries: dict[str, str], what: str) -> None:
    if not isinstance(values, dict):  # a file may contain any JSON value
        raise ValueError(f"{what} is {values!r}; expected a dict")  # noqa: TRY004
    for name in values:
        if name not in entries:
            hint = nearest(str(name), entries) if entries else "it has no other keys"
            raise ValueError(f"unknown key {name!r} in {what}; {hint}")
    for name, expected in entries.items():
        if name not in values:
            raise ValueError(f"{what} has no {name!r}; expected {', '.join(entries)}")
        if not _has_type(values[name], expected):
            raise ValueError(f"{name} is {values[name]!r}; expected {expected}")


def _has_type(value: PyTree, expected: str) -> bool:
    if value is None:
        return expected.endswith(_OR_NONE)
    if isinstance(value, bool) or expected == _YES_NO:
        return isinstance(value, bool) and expected == _YES_NO
    return isinstance(value, int if expected.startswith(_WHOLE) else (int, float))


def _make(cls: Any, values: dict[str, Any]) -> Any:
    try:
        return cls(**values)
    except (TypeError, OverflowError) as error:  # an integer of hundreds of digits
        raise ValueError(str(error)) from None


def _plain(value: PyTree) -> Any:
    return value if value is None else np.asarray(value).item()
