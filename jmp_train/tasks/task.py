"""A task: loss, metrics and prediction of a kind of problem, as functions of a network's outputs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from jmp_train.policy.precision import Precision
from jmp_train.sharding.placement import Annotations
from jmp_train.types import Batch, Function, Key, PyTree

Outputs = Any
Metric = Callable[[Outputs, Batch], Any]

RESERVED = (
    *("loss", "step", "split", "grad_norm", "averaged_steps", "learning_rate", "loss_scale"),
    *("skipped_steps", "skipped_in_row", "nonfinite", "nonfinite_tensors", "steps_per_second"),
    *("skipped_examples", "seconds", "policy", "diverged_seeds", "speed_up", "peak_memory_bytes"),
)
"""Names that no metric may have: those of other values in a record or a comparison; and "last_..."."""
_NAME = re.compile(r"\w[\w .-]{0,99}")  # of a file too: plots/NAME.png


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """What a network is trained for: pure functions of its outputs and of a batch.

    A batch is a dict of arrays whose leading axis counts examples. A `"mask"` in it, bool, excludes
    padding from the loss and the metrics. It has the shape of their values or its first axes: (batch,)
    for one value per example, (batch,) or (batch, tokens) for one per token. If a mask per token meets
    a value per example, the example counts if any of its tokens does; a function that combines tokens
    has to leave masked ones out itself. So has a loss of the whole batch.

    The name of a metric has 1 to 100 letters, digits, spaces, and `_`, `.`, `-`; it begins with a
    letter, a digit or `_`. The names in `RESERVED`, and those that begin with "last_", are taken by
    other values of a record.

    Raises:
      ValueError: for a field of another type, or a metric of another name.

    >>> import jax.numpy as jnp
    >>> def squared_error(outputs, batch):
    ...     return jnp.square(outputs[:, 0] - batch["price"])
    >>> task = Task(loss=squared_error, inputs=("rooms", "area"), targets=("price",))
    >>> task.metric, task.highest
    ('loss', False)
    """

    loss: Metric
    """`loss(outputs, batch)` returns one value per example, (batch,), or per token, (batch, tokens),
    which are averaged; or a pair `(values, weights)`, whose loss is sum(values) / sum(weights); or the
    loss of the whole batch, (), which is not evaluated on held-out data."""
    metrics: Mapping[str, Metric] = dataclasses.field(default_factory=dict)
    """By name, `metric(outputs, batch)`: values per example or token, floating or bool, whose mean is
    the metric; or a pair `(values, weights)`, for sum(values) / sum(weights) over the whole data."""
    inputs: tuple[str, ...] = ("x",)
    """Names of the arrays of a batch that the network is called with, in order."""
    targets: tuple[str, ...] = ()
    """Names of the other arrays that the loss and the metrics read."""
    metric: str = "loss"
    """Name of the metric that runs and checkpoints are compared by."""
    highest: bool = False
    """Whether higher values of that metric are better."""
    predict: Callable[[Outputs], Mapping[str, jax.Array]] | None = None
    """`predict(outputs)` returns arrays by name, one row per example; None returns the outputs: an
    array by the name "output"; a dict by its keys, nested ones as "a.b"; a tuple as "output.0",
    "output.1" and so on."""
    call: Callable[[Function, Batch], Outputs] | None = None
    """`call(net, batch)` computes the outputs, where `net(*args, method="__call__", **kwargs)` calls
    the network; None calls it with the arrays of `inputs`, and casts outputs to the output dtype."""
    predict_call: Callable[[Function, Batch], Outputs] | None = None
    """`call` for predictions, without targets; None uses that of the loss."""
    train_loss: Metric | None = None
    """`loss` of training steps, such as one with label smoothing; None uses `loss`."""
    augment: Callable[[Batch, Key], Batch] | None = None
    """`augment(batch, key)` returns a changed batch in training steps, such as one with mixed images,
    before the network is called; the loss and the metrics of training are given it too. It is traced
    with the step, for each micro-batch with a key of its own."""
    generate: Callable[..., jax.Array] | None = None
    """`generate(net, spec, prompt, key, length=, temperature=)` continues a text."""

    def __post_init__(self) -> None:
        for field in ("inputs", "targets"):
            value = getattr(self, field)
            value = (value,) if isinstance(value, str) else tuple(value)
            object.__setattr__(self, field, value)
        if not callable(self.loss):
            line = f"loss is {self.loss!r}; expected a function loss(outputs, batch)"
            raise ValueError(line)  # noqa: TRY004  (a value in an experiment, like any other)
        for field in ("train_loss", "augment"):
            value = getattr(self, field)
            if value is not None and not callable(value):
                raise ValueError(f"{field} is {value!r}; expected a function, or None")
        if not isinstance(self.metrics, Mapping) or not all(map(callable, self.metrics.values())):
            raise ValueError("metrics are not a dict of functions; expected {'name': function}")
        for name in self.metrics:
            _check_name(name)
        known = ("loss", *self.metrics)
        if self.metric not in known:
            raise ValueError(f"metric is {self.metric!r}; expected one of {', '.join(known)}")

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the arrays that a batch must have."""
        return (*self.inputs, *self.targets)


def _check_name(name: Any) -> None:
    """Raise ValueError for a name that no metric may have."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"a metric has the name {name!r}; expected 1 to 100 letters, digits, spaces, and _ . -, "
            "that begin with a letter, a digit or _, because plots have files of that name"
        )
    if name in RESERVED or name.startswith("last_"):
        raise ValueError(
            f"a metric has the name {name!r}, which records use; expected another than "
            f"{', '.join(RESERVED)}, and names that begin with last_"
        )


class TaskFunctions(NamedTuple):
    """A network with the loss, metrics and prediction of a task, as pure functions."""

    init: Callable[[Key], tuple[PyTree, PyTree]]
    """`init(key) -> (params, model_state)`; the model state is None for a network without one."""
    loss_fn: Function
    """`loss_fn(params, batch, *, key=None, model_state=None)`, for `make_step`."""
    metrics_fn: Callable[..., dict[str, Any]]
    """`metrics_fn(params, batch, *, model_state=None)`, for `make_evaluate`."""
    predict_fn: Callable[..., dict[str, jax.Array]]
    """`predict_fn(params, batch, *, model_state=None)`: arrays by name, one row per example."""
    generate: Callable[..., jax.Array] | None
    """`generate(params, prompt, key, length=..., temperature=...)` continues a text; None if the task
    does not generate text.

    Raises ValueError for an empty prompt, for a length below 1, and for a temperature that is
    negative or not finite."""
    precision: Precision
    """The precision for `make_step` and `make_evaluate`: what they have to cast."""
    network: Callable[[PyTree, PyTree], Any]
    """`network(params, model_state)` returns the network with its arrays, as a user of Flax expects it
    (`jmp_train.flax.functional.Functional`)."""
    annotations: Callable[[], Annotations]
    """`annotations()` returns the mesh axes that the network names for its parameters
    (`jmp_train.flax.annotations`)."""
