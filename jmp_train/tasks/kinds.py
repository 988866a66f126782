"""Kinds of tasks by name, and the task of a model for a data set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import linen, nnx

from jmp_train.errors import nearest
from jmp_train.flax.functional import functional
from jmp_train.policy.policy import Policy
from jmp_train.policy.precision import Precision, get_precision
from jmp_train.policy.rules import Rules
from jmp_train.spec import DataSpec
from jmp_train.tasks.classification import classification
from jmp_train.tasks.language_modelling import language_modelling
from jmp_train.tasks.task import Task


class TaskKind(NamedTuple):
    """A kind of task: its constructor, inputs and main metric."""

    make: Callable[..., Task]
    """`make(net, model, spec, precision) -> Task`; `net` is None for a model without `network`."""
    reads: tuple[str, ...]
    """Names of the arrays that a batch must have."""
    metric: str
    """Name of the metric that models are compared by."""
    highest: bool
    """Whether higher values of the metric are better."""


TASKS: dict[str, TaskKind] = {
    "classification": TaskKind(classification, ("image", "label"), "accuracy", True),
    "language_modelling": TaskKind(language_modelling, ("tokens",), "bits_per_byte", False),
}


def make_task(model: Any, spec: DataSpec, precision: str | Policy | Rules | Precision) -> Task:
    """Return the task of a model on a data set, under a precision.

    Args:
      model: configuration of the model, with an attribute `task`, one of `TASKS` by name or a
        `TaskKind`, and a method `network(spec, *, dtype, param_dtype, rngs)` that constructs an NNX
        or a Linen module. A `TaskKind` that makes its own parameters needs no `network`.
      spec: spec of the data set.
      precision: an argument of `get_precision`.

    Raises:
      ValueError: if a rule matches no module, if the data lack an array that the task reads, or if
        the network has other state than parameters.
    """
    precision = get_precision(precision)
    kind = kind_of(model)
    if not set(kind.reads) <= set(spec.example):
        name = model.task if isinstance(model.task, str) else "the task"
        raise ValueError(
            f"the data have {' and '.join(spec.example)}; expected {' and '.join(kind.reads)}, "
            f"which {name} reads"
        )

    def make(policy: Policy, rngs: nnx.Rngs) -> nnx.Module | linen.Module:
        dtypes = {"dtype": policy.compute_dtype, "param_dtype": policy.param_dtype}
        return model.network(spec, **dtypes, rngs=rngs)

    net = None
    if hasattr(model, "network"):
        one = spec.example[kind.reads[0]]
        net = functional(make, precision, jax.ShapeDtypeStruct((1, *one.shape), one.dtype))
    return kind.make(net, model, spec, precision)


def kind_of(model: Any) -> TaskKind:
    """Return the kind of task that a model is trained for.

    Raises:
      ValueError: for a `task` that is neither a `TaskKind` nor one of `TASKS`.
    """
    kind = getattr(model, "task", "")
    if isinstance(kind, TaskKind):
        return kind
    if isinstance(kind, str) and kind in TASKS:
        return TASKS[kind]
    name = type(model).__name__
    raise ValueError(f"the task of {name} is {kind!r}; {nearest(str(kind), TASKS)}, or a TaskKind")
