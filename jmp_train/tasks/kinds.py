"""Kinds of tasks by name, and the task of a model for a data set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx

from jmp_train.flax.functional import functional_nnx
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
    """`make(net, model, spec, precision) -> Task`."""
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
      model: configuration of the model, with an attribute `task`, one of `TASKS`, and a method
        `network(spec, *, dtype, param_dtype, rngs)` that constructs an NNX module.
      spec: spec of the data set.
      precision: an argument of `get_precision`.

    Raises:
      ValueError: if a rule matches no module, or if the data lack an array that the task reads.
    """
    precision = get_precision(precision)
    kind = TASKS[model.task]
    if not set(kind.reads) <= set(spec.example):
        raise ValueError(
            f"the data have {' and '.join(spec.example)}; expected {' and '.join(kind.reads)}, "
            f"which {model.task} reads"
        )

    def make(policy: Policy, rngs: nnx.Rngs) -> nnx.Module:
        dtypes = {"dtype": policy.compute_dtype, "param_dtype": policy.param_dtype}
        return model.network(spec, **dtypes, rngs=rngs)

    return kind.make(functional_nnx(make, precision), model, spec, precision)
