"""Options that tyro makes of a dataclass: their order in the help, and their help texts."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Iterator
from typing import Annotated, Any

import docstring_parser
import tyro
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from jmp_train.config.experiment import AnyExperiment, Experiment
from jmp_train.config.settings import setting_fields
from jmp_train.configurable import Configured, described, parameters_of

#: The options that the help of an experiment shows first.
COMMON = (
    "policy",
    "steps",
    "batch_size",
    "lr",
    "seed",
    "run_dir",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "micro_batches",
)
#: Short options. They are here and not aliases of tyro, which the optimizers' file would import.
SHORT = {"--lr": "--optimizer.learning-rate"}

registry = ConstructorRegistry()


@registry.struct_rule
def dataclass_options(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Rule of tyro: a dataclass with the types and the values of its default.

    A field `experiment` does not become a group of options: the fields of the experiment stand beside
    the others, the common ones first.
    """
    if not dataclasses.is_dataclass(info.default):
        return None
    specs = list(_field_specs(info.default))
    experiment = getattr(info.default, "experiment", None)
    if not isinstance(experiment, Experiment):
        return StructConstructorSpec(_changed(info.default), tuple(specs))
    own = {spec.name: spec for spec in specs if spec.name != "experiment"}
    fields = {spec.name: spec for spec in _field_specs(experiment)}
    short = _short_learning_rate(experiment)
    every = {**fields, short.name: short, **own}
    ordered = {name: every[name] for name in COMMON if name in every} | every

    def instantiate(**values: Any) -> Any:
        changed = dataclasses.replace(experiment, **{name: values[name] for name in fields})
        return type(info.default)(experiment=changed, **{name: values[name] for name in own})

    instantiate.__doc__ = type(info.default).__doc__  # the first line of the help
    return StructConstructorSpec(instantiate, tuple(ordered.values()))


def _changed(default: Any) -> Any:
    """Return a function of options that keeps the fields of the default that are not settings."""

    def instantiate(**values: Any) -> Any:
        return dataclasses.replace(default, **values)

    instantiate.__doc__ = type(default).__doc__
    return instantiate


def _field_specs(default: Any) -> Iterator[StructFieldSpec]:
    """Return the options of a dataclass; types come from the default where it is a dataclass."""
    kinds = typing.get_type_hints(type(default), include_extras=True)
    texts = help_texts(type(default))
    for field in setting_fields(default):
        value = getattr(default, field.name)
        kind: Any = type(value) if dataclasses.is_dataclass(value) else kinds[field.name]
        if isinstance(default, Experiment):
            kind = Annotated[kind, tyro.conf.FlagConversionOff]
        text = texts.get(field.name)
        if isinstance(value, Configured):
            text = _summary(value.__configured__.function)
        yield StructFieldSpec(field.name, kind, value, helptext=text)


def _summary(function: Any) -> str:
    """Return the first line of a docstring, or the name."""
    line = (inspect.getdoc(function) or "").partition("\n")[0]
    # A module of Linen without a docstring has that of its base class or of its fields.
    return (
        line
        if line and not line.startswith(("Base class", f"{described(function)}("))
        else (f"Arguments of {described(function)}.")
    )


def _short_learning_rate(experiment: AnyExperiment) -> StructFieldSpec:
    """Return an option for the help alone: `parse` writes --lr out in full."""
    (option,) = SHORT.values()
    text = f"Peak learning rate; short for {option}."
    return StructFieldSpec("lr", float, experiment.optimizer.learning_rate, helptext=text)


def help_texts(kind: type) -> dict[str, str]:
    """Return the docstrings of the fields of a dataclass, each in one line.

    tyro reads them too, but breaks a text at the line breaks of its source.
    """
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except (OSError, TypeError, ValueError, SyntaxError):  # no source, as in a notebook
            continue
        assert isinstance(tree, ast.ClassDef)
        for pair in zip(tree.body, tree.body[1:], strict=False):
            match pair:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    texts[name] = " ".join(text.split())
    if issubclass(kind, Configured):  # a text of the base is not about an argument of the same name
        function = kind.__configured__.function
        texts = {name: text for name, text in texts.items() if name not in parameters_of(function)}
        texts |= _argument_texts(function)
    return texts


def _argument_texts(function: Any) -> dict[str, str]:
    """Return what the docstring of a function or a class says about its arguments."""
    kind = function if isinstance(function, type) else type(None)
    texts = help_texts(kind) if dataclasses.is_dataclass(kind) else {}
    constructor = function.__init__ if isinstance(function, type) else function
    for owner in (function, constructor):
        for argument in docstring_parser.parse(inspect.getdoc(owner) or "").params:
            text = " ".join((argument.description or "").split())
            texts[argument.arg_name] = text[:1].upper() + text[1:]
    return texts
