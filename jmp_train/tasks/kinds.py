"""The kinds of tasks by name, and the task of a model on data."""

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
    """A kind of task: what it reads, what it reports, and how it is made."""

    make: Callable[..., Task]
    """`make(net, model, spec, precision) -> Task`."""
    reads: tuple[str, ...]
    """Names of the arrays that it needs in a batch."""
    metric: str
    """The metric that models are compared by."""
    highest: bool
    """Whether the highest value of the metric is the best."""


TASKS: dict[str, TaskKind] = {
    "classification": TaskKind(classification, ("image", "label"), "accuracy", True),
    "language_modelling": TaskKind(language_modelling, ("tokens",), "bits_per_byte", False),
}


def make_task(model: Any, spec: DataSpec, precision: str | Policy | Rules | Precision) -> Task:
    """Return the task of a model's configuration on data, under a precision.

    Args:
      model: has a `task`, one of `TASKS`, and a method `network(spec, *, dtype, param_dtype, rngs)`
        that constructs an NNX module.
      spec: the data's.
      precision: what `get_precision` takes.

    Raises:
      ValueError: for a rule that matches no module, and for data without what the task reads.
    """
    precision = get_precision(precision)
    kind = TASKS[model.task]
    if not set(kind.reads) <= set(spec.example):
        raise ValueError(
            f"{model.task} reads {' and '.join(kind.reads)}, and the data have "
            f"{' and '.join(spec.example)}; expected data that have what the task reads"
        )

    def make(policy: Policy, rngs: nnx.Rngs) -> nnx.Module:
        dtypes = {"dtype": policy.compute_dtype, "param_dtype": policy.param_dtype}
        return model.network(spec, **dtypes, rngs=rngs)

    return kind.make(functional_nnx(make, precision), model, spec, precision)
