"""A network of any origin with its constructor's arguments as settings."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from flax import linen, nnx

from jmp_train.configurable import (
    Configured,
    call,
    configured,
    described,
    parameters_of,
    settings_of,
    simple_type,
)
from jmp_train.spec import DataSpec
from jmp_train.types import DTypeLike

_SUPPLIED = ("rngs", "dtype", "param_dtype")
_OF_LINEN = ("parent", "name")


def Model(network: Callable[..., Any], /, **arguments: Any) -> Configured:
    """Return the model of an experiment: a network and the arguments of its constructor.

    The network does not need to know about precision, loss or data. It is constructed when a run
    starts. Simple arguments become options of the command line, such as `--model.width 64`, and are
    stored with the run; others are fixed in the experiment.

    Args:
      network: a class of `nnx.Module` or `linen.Module`, or a function that returns a module, or a
        pair of functions: `init(key) -> params` and `apply(params, *inputs) -> outputs`. A parameter
        `rngs` gets the random streams (`nnx.Rngs`). Parameters `dtype` and `param_dtype` get the
        dtypes of the policy; a network without `dtype` is put under the policy by
        `jmp_train.flax.apply_policy`. Or a module of Linen: it is used as it is, unless one of its
        fields is changed.
      **arguments: arguments of the network. A function of one parameter with the name `spec` is
        called with the `DataSpec`, for sizes that depend on the data.

    Raises:
      ValueError: for an argument that the network does not have, for one without a value, and for
        anything else than a network, such as a module of NNX that has its values.

    >>> class Net(nnx.Module):
    ...     def __init__(self, inputs: int, classes: int, width: int = 32, *, rngs: nnx.Rngs):
    ...         self.hidden = nnx.Linear(inputs, width, rngs=rngs)
    ...         self.out = nnx.Linear(width, classes, rngs=rngs)
    >>> model = Model(Net, inputs=64, classes=lambda spec: spec.classes)
    >>> model.settings
    {'inputs': 64, 'width': 32}
    >>> construct(model, DataSpec({}, 10), rngs=nnx.Rngs(0)).out.out_features
    10
    """
    if isinstance(network, linen.Module):
        return _of_instance(network, arguments)
    linens = isinstance(network, type) and issubclass(network, linen.Module)
    supplied = (*_SUPPLIED, *(_OF_LINEN if linens else ()))
    what = f"Model({described(network)})"
    if isinstance(network, nnx.Module):
        kind = type(network).__name__
        raise ValueError(  # noqa: TRY004  (a value in an experiment, like any other)
            f"the model is a module {kind} with its values; expected the class, as in "
            f"jmp_train.Model({kind}, ...), because a run makes the values from its seed "
            "(docs/models.md)"
        )
    if not callable(network):
        raise ValueError(  # noqa: TRY004  (a value in an experiment, like any other)
            f"{what}: expected an nnx.Module or a linen.Module class, or a function that returns a "
            "module or a pair (init, apply) (docs/models.md)"
        )
    _check_functions(network, arguments, what)
    return configured(network, arguments, supplied=supplied, what=what)


def _check_functions(network: Callable[..., Any], arguments: Mapping[str, Any], what: str) -> None:
    """Raise ValueError for a function of other parameters than `spec` where a number is expected."""
    for name, value in arguments.items():
        function = callable(value) and not isinstance(value, type)
        if function and simple_type(network, name) and not depends_on_spec(value):
            raise ValueError(
                f"{what}: {name} is a function; expected a value, or a function whose one parameter has "
                "the name spec"
            )


def construct(
    model: Configured,
    spec: DataSpec,
    *,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike | None = None,
    rngs: nnx.Rngs,
) -> Any:
    """Return the network of a model for a data set.

    Args:
      model: what `Model` returned.
      spec: spec of the data, for arguments that depend on it.
      dtype: dtype of the compute, for a network with that parameter; None leaves its default.
      param_dtype: dtype of the parameters, likewise.
      rngs: random streams, for a network with a parameter `rngs`.

    Raises:
      ValueError: from the constructor; a message that begins with the name of a setting, such as
        "width is 0", gets "model." before it.
    """
    function, fixed, _ = model.__configured__
    settings = settings_of(model)
    arguments = {**settings, **fixed}
    takes = parameters_of(function)
    supplied = {
        name: value
        for name, value in (("dtype", dtype), ("param_dtype", param_dtype), ("rngs", rngs))
        if name in takes and name not in arguments and value is not None
    }
    if isinstance(model, _OfInstance) and settings == model.__original__:
        return _with_fields(model.__instance__, supplied)
    for name, value in fixed.items():
        arguments[name] = value(spec) if depends_on_spec(value) else value
    try:
        return call(function, arguments | supplied)
    except ValueError as error:
        if str(error).partition(" ")[0] not in settings:
            raise
        raise ValueError(f"model.{error}") from None  # the name of the setting, as of its option


def takes_dtype(model: Configured) -> bool:
    """Return whether the network has a parameter `dtype` that the policy decides."""
    function, fixed, _ = model.__configured__
    given = {**settings_of(model), **fixed}
    return "dtype" in parameters_of(function) and "dtype" not in given


def depends_on_spec(value: Any) -> bool:
    """Return whether an argument is a function of the spec: its one parameter is named `spec`.

    >>> depends_on_spec(lambda spec: spec.classes), depends_on_spec(lambda x: x), depends_on_spec(3)
    (True, False, False)
    """
    if not callable(value):
        return False
    try:
        return list(parameters_of(value)) == ["spec"]
    except (TypeError, ValueError):  # a built-in function
        return False


@dataclasses.dataclass(frozen=True, eq=False)
class _OfInstance(Configured):
    """A model of a Linen module with values."""

    __instance__: ClassVar[linen.Module]
    __original__: ClassVar[Mapping[str, Any]]  # its settings


def _of_instance(module: linen.Module, arguments: Mapping[str, Any]) -> Configured:
    """Return the model of a Linen module with values: its fields are the arguments."""
    kind = type(module)
    parameters = parameters_of(kind)
    names = [name for name in parameters if name not in _OF_LINEN]
    values = {name: getattr(module, name) for name in names}
    given = {
        name: value
        for name, value in values.items()
        if name not in _SUPPLIED or value is not parameters[name].default
    }
    if arguments or any(map(depends_on_spec, values.values())):
        return Model(kind, **{**given, **arguments})
    what = f"Model({described(kind)})"
    supplied = (*_SUPPLIED, *_OF_LINEN)
    model = configured(kind, given, base=_OfInstance, supplied=supplied, what=what)
    own: Any = type(model)
    own.__instance__, own.__original__ = module, settings_of(model)
    return model


def _with_fields(module: linen.Module, fields: Mapping[str, Any]) -> linen.Module:
    """Return a module with other values of fields, without a call of `__post_init__`."""
    if not fields:
        return module
    module = copy.copy(module)
    for name, value in fields.items():
        object.__setattr__(module, name, value)
    return module
