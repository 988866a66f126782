"""Settings from signatures: which arguments become fields, with which types and values."""

import dataclasses
import functools
import math
import types
import typing
from typing import Literal, Optional

import numpy as np
import pytest
from flax import nnx

import jmp_train as jt
from jmp_train.cli.help import help_texts
from jmp_train.config.settings import settings_in
from jmp_train.configurable import call, configured
from jmp_train.data.data import own_of
from jmp_train.models.model import construct
from jmp_train.spec import DataSpec


def make(function, **values):
    return configured(function, values, what=f"Model({getattr(function, '__name__', 'f')})")


def kinds(config):
    hints = typing.get_type_hints(type(config))
    return {field.name: hints[field.name] for field in dataclasses.fields(config)}


def annotated(
    a: Optional[int] = None,  # noqa: UP045
    b: Literal["x", "y"] = "x",
    c: tuple[int, ...] = (1, 2),
    d: "float" = 1.0,
    e: int | None = 3,
    f: list[int] = [],  # noqa: B006
    g: bool = False,
):
    return a, b, c, d, e, f, g


def test_simple_annotations_are_the_types_of_the_fields():
    assert kinds(make(annotated)) == {
        "a": Optional[int],  # noqa: UP045
        "b": Literal["x", "y"],
        "c": tuple[int, ...],
        "d": float,
        "e": int | None,
        "f": tuple[int, ...],
        "g": bool,
    }


@pytest.mark.parametrize(
    "values,message",
    [
        ({"a": "x"}, "a is 'x'; expected an integer or None"),
        ({"b": "z"}, "b is 'z'; expected one of x, y"),
        ({"c": (1, "x")}, "c is .*; expected a tuple, each an integer"),
        ({"d": "1"}, "d is '1'; expected a number"),
        ({"e": 1.5}, "e is 1.5; expected an integer or None"),
        ({"g": 1}, "g is 1; expected True or False"),
    ],
)
def test_a_value_of_another_type_than_annotated_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        make(annotated, **values)


def test_types_without_annotations_are_those_of_the_values():
    config = make(lambda a=1, b=2.0, c="x", d=(1.0,), e=None, f=abs, g=(1, "x"): 0)
    assert kinds(config) == {"a": int, "b": float, "c": str, "d": tuple[float, ...]}


def test_a_list_becomes_a_tuple():
    config = make(annotated, c=[3], f=[4, 5])
    assert (config.c, config.f) == ((3,), (4, 5))
    hash(config)


def module_of(text):
    module = types.ModuleType("texts")
    exec(compile(text, "texts", "exec"), module.__dict__)  # noqa: S102
    return module


def test_annotations_as_strings_are_read():
    text = "from __future__ import annotations\ndef net(a: int | None = None, b: float = 1): ..."
    assert kinds(make(module_of(text).net)) == {"a": int | None, "b": float}


def test_annotations_that_cannot_be_read_leave_the_types_of_the_values():
    text = (
        "from __future__ import annotations\ndef net(a: int | None = None, b: Missing = 'x'): ..."
    )
    assert kinds(make(module_of(text).net)) == {"a": int | None, "b": str}


def test_a_partial_has_its_values_as_defaults():
    def net(inputs, width: int = 8, rate: float = 0.0): ...

    config = make(functools.partial(net, 3, width=4))
    assert config.settings == {"width": 4, "rate": 0.0}
    assert kinds(config) == {"width": int, "rate": float}


def test_arguments_of_a_function_of_any_keyword_are_settings():
    def net(a: int = 1, **rest): ...

    assert make(net, b=2, c=abs).settings == {"a": 1, "b": 2}


def test_functions_and_arrays_are_fixed():
    config = make(annotated, c=lambda spec: 3)
    fixed = config.__configured__.fixed
    assert "c" not in config.settings and callable(fixed["c"])
    with pytest.raises(TypeError):
        fixed["c"] = 1


@pytest.mark.parametrize(
    "function,values,message",
    [
        (annotated, {"aa": 1}, r"Model\(annotated\) has no argument 'aa'; did you mean 'a'"),
        (lambda: 0, {"x": 1}, "has no argument 'x'; it takes none"),
        (lambda x: 0, {}, "lacks the argument 'x'; expected a value for it"),
    ],
)
def test_unknown_and_missing_arguments_are_named(function, values, message):
    with pytest.raises(ValueError, match=message):
        make(function, **values)


def test_a_configuration_is_frozen_and_replaced_with_checks():
    config = make(annotated)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.g = True
    assert dataclasses.replace(config, g=True).settings == {**config.settings, "g": True}
    with pytest.raises(ValueError, match="g is 3; expected True or False"):
        dataclasses.replace(config, g=3)


def other(a: int = 1): ...


def test_equality_and_hash_are_of_function_and_settings():
    def same(a: int = 1): ...

    one, two = make(other), make(other, a=1)
    assert one == two and hash(one) == hash(two) and one != make(other, a=2)
    assert one != make(same) and one != 1


def test_equality_is_of_the_fixed_arguments_too():
    def net(act=None, table=None): ...

    def factor(x, by):
        return make(net, act=lambda y: by * y, table=x)

    ones = np.ones(2)
    assert make(net, act=math.sin) == make(net, act=math.sin) != make(net, act=math.cos)
    assert factor(ones, 2) == factor(np.ones(2), 2), "a lambda is a new object in each call"
    assert factor(ones, 2) != factor(ones, 3) and factor(ones, 2) != factor(np.zeros(2), 2)
    assert factor(ones, 2) != factor(np.ones(3), 2) and factor(ones, 2) != factor([1.0], 2)
    assert hash(factor(ones, 2)) == hash(factor(ones, 2))


NAMES = [
    *("function", "fixed", "settings", "about", "name", "load", "transform", "batch_transform"),
    *("self", "cls", "kind", "model", "obj", "config", "values", "what", "base", "transformed"),
    *("_identity", "_class_count", "__configured__", "__init__", "_hidden", "network", "arguments"),
    *("window", "workers", "on_bad", "_common"),
]


@pytest.mark.parametrize("name", NAMES)
def test_an_argument_may_have_any_name(name):
    net = module_of(f"def net({name}: int = 1, other: int = 2): return {name}, other").net
    model = jt.Model(net, **{name: 3})
    data = jt.Data(module_of(f"def load({name}: int = 1): return {{'x': [0.0] * {name}}}").load)
    if not name.startswith("__"):
        assert model.__configured__.fixed == {}
        model = dataclasses.replace(model, **{name: 4})
        data = dataclasses.replace(data, **{name: 4})
        assert settings_in(data)[name] == 4 and help_texts(type(data)) is not None
        assert len(own_of(data).load().train) == 3  # and one held out
    expected = 3 if name.startswith("__") else 4
    assert construct(model, DataSpec({}, 2), rngs=nnx.Rngs(0)) == (expected, 2)
    assert dataclasses.replace(model) == model and hash(model) is not None
    assert own_of(data).name == "load" and own_of(data).transformed is None


@pytest.mark.parametrize("name", ["name", "transform", "batch_transform", "load", "settings"])
def test_an_argument_of_data_that_the_function_has_is_its_own(name):
    load = module_of(f"def load({name}=None): return {{'x': [{name}(1)] * 5}}").load
    data = jt.Data(load, **{name: lambda x: 7.0})
    dataset = own_of(data).load()
    assert dataset.eval["x"].tolist() == [7.0]
    assert own_of(data).name == "load" and own_of(data).transformed is None


def test_names_that_no_field_can_have_are_fixed():
    config = make(lambda **rest: rest, **{"class": 3, "a b": 4, "c": 5})
    assert config.settings == {"c": 5}
    assert call(config.__configured__.function, config.__configured__.fixed) == {
        "class": 3,
        "a b": 4,
    }


def test_arguments_by_position_alone_are_settings():
    def net(width, act=abs, depth=2, /, *, rate: float = 0.5):
        return width, act, depth, rate

    model = dataclasses.replace(jt.Model(net, width=8), depth=3)
    assert construct(model, DataSpec({}, 2), rngs=nnx.Rngs(0)) == (8, abs, 3, 0.5)

    def load(rows, /):
        return {"x": np.arange(rows)}

    assert len(jt.Data(load, rows=10).load().train) == 8


class Documented:
    """A network.

    Args:
      width: number of features,
        in each layer.
    """

    def __init__(self, width: int = 1, depth: int = 2):
        """Construct it.

        Args:
          depth: number of layers.
        """


def test_help_texts_come_from_the_docstrings_of_class_and_constructor():
    texts = help_texts(type(make(Documented)))
    assert texts["width"] == "Number of features, in each layer."
    assert texts["depth"] == "Number of layers."


def test_help_texts_of_linen_come_from_below_the_fields():
    from tests.models.test_model import LinenNet

    texts = help_texts(type(configured(LinenNet, {"classes": 2}, supplied=("parent", "name"), what="")))  # fmt: skip
    assert texts["width"] == "Number of hidden features."
