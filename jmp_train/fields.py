"""Checks of a configuration's fields against their annotations, when it is constructed."""

from __future__ import annotations

import dataclasses
import functools
import numbers
import reprlib
import types
import typing
from typing import Any

from jmp_train.errors import nearest


def check_fields(config: Any) -> None:
    """Check that every field of a dataclass has a value of its annotated type.

    Call it first in `__post_init__`, so that later checks may trust the types. Supported
    annotations are bool, int, float (which accepts an integer), str, `Literal`, tuples of one of
    these, and each of them or None. Other annotations are not checked.

    Args:
      config: an instance of a dataclass.

    Raises:
      ValueError: if a value has another type; names the field, the value and the expected type.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Config:
    ...     name: typing.Literal["adam", "sgd"] = "adam"
    ...     widths: tuple[int, ...] = ()
    ...     def __post_init__(self):
    ...         check_fields(self)
    >>> Config("adamx")
    Traceback (most recent call last):
    ValueError: name is 'adamx'; did you mean 'adam'?
    >>> Config(widths=[256])
    Traceback (most recent call last):
    ValueError: widths is [256]; expected a tuple, each an integer
    """
    kinds = _kinds(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not fits(value, kinds[field.name]):
            expected = _expected(value, kinds[field.name])
            raise ValueError(f"{field.name} is {reprlib.repr(value)}; {expected}")


def fits(value: Any, kind: Any) -> bool:
    """Return whether a value is of an annotated type; True if `check_fields` does not support it.

    >>> fits(3, float), fits(True, int), fits((1, 2), tuple[int, ...]), fits(None, str | None)
    (True, False, True, True)
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in inner)
    if origin is typing.Literal:
        return any(value == option and type(value) is type(option) for option in inner)
    if origin is tuple and inner[1:] == (...,):
        return isinstance(value, tuple) and all(fits(item, inner[0]) for item in value)
    if kind in (bool, str, type(None)):
        return isinstance(value, kind)
    if kind in (int, float):
        number = numbers.Integral if kind is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    return True


@functools.cache
def _kinds(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


_DESCRIPTIONS = {bool: "True or False", str: "text", int: "an integer", float: "a number"}


def _expected(value: Any, kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return nearest(str(value), map(str, typing.get_args(kind)))
    return f"expected {_described(kind)}"


def _described(kind: Any) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_described, inner))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin is tuple:
        return f"a tuple, each {_described(inner[0])}"
    return _DESCRIPTIONS.get(kind, "None" if kind is type(None) else str(kind))
