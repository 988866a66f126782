"""Settings from the signature of a function: its simple arguments become fields of a dataclass."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import keyword
import reprlib
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np

from jmp_train.errors import nearest
from jmp_train.fields import check_fields

_SIMPLE = (bool, int, float, str)


class Own(NamedTuple):
    """What a configuration has beside its settings."""

    function: Callable[..., Any]
    """The function that the settings are arguments of."""
    fixed: Mapping[str, Any]
    """The given arguments that are not settings, such as functions."""
    about: Mapping[str, Any]
    """What else was given, such as the transforms of data."""


@dataclasses.dataclass(frozen=True, eq=False)
class Configured:
    """Base of the dataclasses that `configured` makes: a function with its settings as fields.

    Two are equal if their functions have the same name and all that was given is equal. Fields may
    have any name, also those of the attributes here: code of this package reads `__configured__` and
    `settings_of`, which no field can replace.
    """

    __configured__: ClassVar[Own]

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def settings(self) -> dict[str, Any]:
        """The fields and their values."""
        return settings_of(self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Configured):
            return NotImplemented
        one, two = self.__configured__, other.__configured__
        return (
            _identity(self) == _identity(other)
            and _same_items(one.fixed, two.fixed)
            and _same_items(one.about, two.about)
        )

    def __hash__(self) -> int:
        return hash(_identity(self))


def settings_of(config: Any) -> dict[str, Any]:
    """Return the fields of a dataclass and their values."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _identity(config: Configured) -> Any:
    function = config.__configured__.function
    names = getattr(function, "__qualname__", ""), getattr(function, "__module__", "")
    return *names, tuple(settings_of(config).items())


def _same_items(one: Mapping[str, Any], two: Mapping[str, Any]) -> bool:
    return one.keys() == two.keys() and all(_same(one[name], two[name]) for name in one)


def _same(one: Any, two: Any) -> bool:
    """Return whether two values are equal; functions are if they are one, or do the same."""
    if one is two or type(one) is not type(two):
        return one is two
    try:
        if isinstance(one, types.FunctionType):  # a lambda is a new object each time its line runs
            return _same_items(_contents(one), _contents(two))
        return bool(np.all(one == two))
    except Exception:  # noqa: BLE001  (`==` is that of a user's class; a closure may contain itself)
        return False


def _contents(function: types.FunctionType) -> dict[Any, Any]:
    """Return what determines what a function does, but for the globals of its module."""
    names = ("__module__", "__code__", "__defaults__", "__kwdefaults__")
    cells = enumerate(function.__closure__ or ())
    return {name: getattr(function, name) for name in names} | {
        i: cell.cell_contents for i, cell in cells
    }


def configured(
    function: Callable[..., Any],
    values: Mapping[str, Any],
    *,
    base: type[Configured] = Configured,
    supplied: Collection[str] = (),
    about: Mapping[str, Any] = types.MappingProxyType({}),
    what: str,
) -> Any:
    """Return a frozen dataclass whose fields are the simple arguments of a function.

    A simple argument is a bool, a number, text, or a tuple of these; a list becomes a tuple. Its
    value is the given one, or the default in the signature, and its type is the annotation, or that
    of the value. Other arguments, such as functions and arrays, are fixed.

    Args:
      function: a function or a class.
      values: arguments by name.
      base: base class of the dataclass.
      supplied: names of arguments that are supplied later, and so are no settings unless given.
      about: what else was given, to be compared with the arguments.
      what: the call of the user, for messages, such as "Model(Net)".

    Raises:
      ValueError: for an argument that the function does not have, and for one without a value.

    >>> def net(width: int = 8, activation=abs): ...
    >>> config = configured(net, {"width": 4}, what="Model(net)")
    >>> config.width, dataclasses.replace(config, width=5).settings
    (4, {'width': 5})
    """
    parameters = parameters_of(function)
    named = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    if all(p.kind != p.VAR_KEYWORD for p in parameters.values()):
        for name in values:
            if name not in named:
                hint = nearest(name, named) if named else "it takes none"
                raise ValueError(f"{what} has no argument {name!r}; {hint}")
    missing = [
        name
        for name, parameter in named.items()
        if parameter.default is parameter.empty and name not in values and name not in supplied
    ]
    if missing:
        raise ValueError(f"{what} lacks the argument {missing[0]!r}; expected a value for it")
    hints = _hints(function)
    fields, fixed = [], {}
    for name in dict.fromkeys([*named, *values]):
        if name in values:
            value = values[name]
        elif name in supplied or named[name].default is inspect.Parameter.empty:
            continue
        else:
            value = named[name].default
        value = tuple(value) if isinstance(value, list) else value
        kind = _kind(value, hints.get(name))
        if kind is not None and _names_a_field(name):
            fields.append((name, kind, dataclasses.field(default=value)))
        elif name in values:
            fixed[name] = values[name]
    made = dataclasses.make_dataclass(
        getattr(function, "__name__", type(function).__name__),
        fields,
        bases=(base,),
        namespace={
            "__configured__": Own(
                function, types.MappingProxyType(fixed), types.MappingProxyType(dict(about))
            )
        },
        frozen=True,
        eq=False,
    )
    return made()


def _names_a_field(name: str) -> bool:
    """Return whether an argument can be a field; of `**rest`, a name may be any text."""
    special = name.startswith("__") and name.endswith("__")
    return name.isidentifier() and not keyword.iskeyword(name) and not special


def call(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Call a function with arguments by name, also with those that it takes by position alone.

    >>> def net(width, /, depth): return width, depth
    >>> call(net, {"depth": 2, "width": 8})
    (8, 2)
    """
    rest, first = dict(arguments), []
    for name, parameter in parameters_of(function).items():
        absent = name not in rest and parameter.default is parameter.empty
        if parameter.kind is not parameter.POSITIONAL_ONLY or absent:
            break
        first.append(rest.pop(name, parameter.default))
    return function(*first, **rest)


def parameters_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters of a function, or of the constructor of a class, without `self`."""
    if isinstance(function, type):  # a metaclass may hide the signature of the constructor
        parameters = dict(inspect.signature(function.__init__).parameters)
        parameters.pop(next(iter(parameters)), None)
        return parameters
    return dict(inspect.signature(function).parameters)


def _hints(function: Any) -> dict[str, Any]:
    """Return the annotations, without those that name what only a type checker can import."""
    inner = getattr(function, "func", function)  # of a functools.partial
    inner = inspect.unwrap(inner.__init__ if isinstance(inner, type) else inner)
    hints = {}
    for name, hint in getattr(inner, "__annotations__", {}).items():
        alone = types.SimpleNamespace(__annotations__={name: hint})
        # An annotation may be any expression.
        with contextlib.suppress(Exception):
            hints |= typing.get_type_hints(alone, globalns=getattr(inner, "__globals__", {}))
    return hints


def simple_type(function: Any, name: str) -> bool:
    """Return whether a parameter is annotated with a type that settings may have.

    >>> def net(width: int, activation=abs): ...
    >>> simple_type(net, "width"), simple_type(net, "activation")
    (True, False)
    """
    hint = _hints(function).get(name)
    return hint is not None and _simple(hint)


def _kind(value: Any, hint: Any) -> Any:
    """Return the type of a setting; None if the value or its annotation is not simple."""
    if typing.get_origin(hint) is list:
        hint = tuple[typing.get_args(hint)[0], ...]
    if isinstance(value, tuple):
        if not all(isinstance(item, _SIMPLE) for item in value):
            return None
        if hint is not None and _simple(hint):
            return hint
        kinds = {type(item) for item in value}
        return tuple[kinds.pop(), ...] if len(kinds) == 1 else None
    if value is not None and not isinstance(value, _SIMPLE):
        return None
    if hint is not None and _simple(hint):
        return hint
    return None if value is None else type(value)


def _simple(hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return all(_simple(option) for option in inner)
    if origin is tuple:
        return inner[1:] == (...,) and inner[0] in _SIMPLE
    return origin is typing.Literal or hint in (*_SIMPLE, type(None))


def described(function: Any) -> str:
    """Return the name of a function for a message."""
    return getattr(function, "__name__", None) or " ".join(reprlib.repr(function).split())
