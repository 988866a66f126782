"""Settings of a configuration by dotted path, as in config.json."""

from __future__ import annotations

import dataclasses
import reprlib
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from jmp_train.errors import nearest
from jmp_train.fields import fits
from jmp_train.types import Json


def flatten(values: Json, prefix: str = "") -> Json:
    """Flatten nested dicts to one dict by dotted path.

    >>> flatten({"steps": 3, "optimizer": {"name": "sgd"}})
    {'steps': 3, 'optimizer.name': 'sgd'}
    """
    flat: Json = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def default_settings(config: Any) -> Json:
    """Return the defaults of a dataclass's settings as nested dicts; those without one are left out.

    >>> from jmp_train.optim import OptimizerConfig
    >>> default_settings(OptimizerConfig(learning_rate=9.0))["learning_rate"]
    0.001
    """
    values: Json = {}
    for field in setting_fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            values[field.name] = default_settings(value)
        elif field.default is not dataclasses.MISSING:
            values[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            values[field.name] = field.default_factory()
    return values


C = TypeVar("C")


def settings_in(config: Any) -> Json:
    """Return the settings of a configuration as nested dicts.

    A dataclass field with the metadata `{"setting": False}`, such as the task of an experiment, is a
    value of Python and no setting.

    >>> from jmp_train.optim import OptimizerConfig
    >>> settings_in(OptimizerConfig(learning_rate=0.5))["learning_rate"]
    0.5
    """
    found: Json = {}
    for field in setting_fields(config):
        value = getattr(config, field.name)
        found[field.name] = settings_in(value) if dataclasses.is_dataclass(value) else value
    return found


def setting_fields(config: Any) -> list[dataclasses.Field[Any]]:
    """Return the dataclass fields of a configuration that are settings."""
    return [f for f in dataclasses.fields(config) if f.metadata.get("setting", True)]


def with_settings(config: C, settings: Mapping[str, Any], prefix: str = "") -> C:
    """Return a configuration with new values for some of its settings.

    Args:
      config: a dataclass; its fields may be dataclasses too.
      settings: values by dotted path, as `flatten` returns them for config.json: tuples as lists,
        non-finite numbers as strings.
      prefix: path of the configuration itself, for error messages.

    Raises:
      ValueError: for an unknown setting, with the nearest valid one; for an invalid value.

    >>> from jmp_train.optim import OptimizerConfig
    >>> with_settings(OptimizerConfig(), {"learning_rate": 0.1, "max_grad_norm": "inf"}).max_grad_norm
    inf
    >>> with_settings(OptimizerConfig(), {"lerning_rate": 0.1}, "optimizer.")
    Traceback (most recent call last):
    ValueError: unknown setting 'optimizer.lerning_rate'; did you mean 'learning_rate'?
    """
    kinds = typing.get_type_hints(type(config))
    fields = [field.name for field in setting_fields(config)]
    inner: dict[str, Json] = {}
    changed: Json = {}
    for path, value in settings.items():
        name, dot, rest = path.partition(".")
        nested = name in fields and dataclasses.is_dataclass(getattr(config, name))
        if name not in fields or (dot and not nested):
            raise ValueError(f"unknown setting {prefix + path!r}; {nearest(name, fields)}")
        if nested and not dot:
            raise ValueError(
                f"{prefix + path} is {reprlib.repr(value)}; expected a dict of settings"
            )
        if nested:
            inner.setdefault(name, {})[rest] = value
        else:
            changed[name] = _from_json(value, kinds[name])
    for name, values in inner.items():
        changed[name] = with_settings(getattr(config, name), values, f"{prefix}{name}.")
    try:
        return dataclasses.replace(config, **changed)  # pyright: ignore
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None


def _from_json(value: Any, kind: Any) -> Any:
    """Undo the conversions of `strict_json`: lists to tuples, strings to non-finite numbers."""
    if isinstance(value, list):
        return tuple(_from_json(item, kind) for item in value)
    if value in ("nan", "inf", "-inf") and not fits(value, kind):
        return float(value)
    return value
