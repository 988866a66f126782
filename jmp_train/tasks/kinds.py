"""Tasks by name, and the functions of a model for a task on a data set."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmp_train.configurable import Configured, described
from jmp_train.errors import nearest
from jmp_train.flax.functional import Functional, functional
from jmp_train.models.model import construct, takes_dtype
from jmp_train.policy.policy import Policy
from jmp_train.policy.precision import Precision, get_precision
from jmp_train.policy.rules import Rules
from jmp_train.spec import DataSpec
from jmp_train.step.accumulation import WeightedLoss
from jmp_train.step.evaluation import naming, values_and_weights, weighted_sums
from jmp_train.tasks.classification import classification, multi_label
from jmp_train.tasks.language_modelling import language_modelling
from jmp_train.tasks.regression import regression
from jmp_train.tasks.sequence_to_sequence import sequence_to_sequence
from jmp_train.tasks.task import Task, TaskFunctions
from jmp_train.types import Batch, Function, Key, PyTree

TASKS: dict[str, Callable[[], Task]] = {
    "classification": classification,
    "multi_label": multi_label,
    "regression": regression,
    "language_modelling": language_modelling,
    "sequence_to_sequence": sequence_to_sequence,
}


def get_task(task: str | Task) -> Task:
    """Return a task by name, or the given one.

    Raises:
      ValueError: for an unknown name, or a value of another type.
    """
    if isinstance(task, Task):
        return task
    if isinstance(task, str) and task in TASKS:
        return TASKS[task]()
    hint = nearest(task, TASKS) if isinstance(task, str) else f"expected one of {', '.join(TASKS)}"
    raise ValueError(f"the task is {task!r}; {hint}, or a jmp_train.Task (docs/models.md)")


def make_task(
    model: Configured,
    task: str | Task,
    spec: DataSpec,
    precision: str | Policy | Rules | Precision,
) -> TaskFunctions:
    """Return the functions of a model for a task on a data set, under a precision.

    Args:
      model: what `jmp_train.Model` returned.
      task: a `Task`, or the name of one of `TASKS`.
      spec: spec of the data set.
      precision: an argument of `get_precision`.

    Raises:
      ValueError: if a rule matches no module, if the data lack an array that the task reads, or if
        the network cannot be constructed from the spec.
    """
    precision = get_precision(precision)
    name = task if isinstance(task, str) else "the task"
    task = get_task(task)
    if not set(task.reads) <= set(spec.example):
        raise ValueError(
            f"the data have {' and '.join(spec.example)}; expected {' and '.join(task.reads)}, which "
            f"{name} reads"
        )
    output_dtype = precision.model.cast_to_output

    def call(net: Function, batch: Batch, own: Any) -> Any:
        if own is not None:
            return own(net, batch)
        return output_dtype(net(*(batch[name] for name in task.inputs)))

    one = {k: np.zeros((1, *x.shape), x.dtype) for k, x in spec.example.items()}
    net = functional(
        functools.partial(construct, model, spec),
        precision,
        lambda net: call(net, one, task.call),
        takes_dtype=takes_dtype(model),
    )
    if task.call is None and not net.has("__call__"):
        raise ValueError(
            f"the network {described(model.__configured__.function)} has no method '__call__', with which {name} "
            "calls it; expected one, or a task with a function `call` (docs/models.md)"
        )
    return TaskFunctions(
        net.init,
        _loss_fn(net, task, functools.partial(call, own=task.call)),
        _metrics_fn(net, task, functools.partial(call, own=task.call)),
        _predict_fn(net, task, functools.partial(call, own=task.predict_call or task.call)),
        None if task.generate is None else _generate(net, task.generate, spec),
        net.precision,
        net.network,
        net.annotations,
    )


class _Call:
    """A network with its arguments, called by a task; remembers the state that the calls return."""

    def __init__(self, net: Functional, params: PyTree, state: PyTree, train: bool, key: Any):
        self._net, self.state = net, state
        self._params = net.precision.cast_to_compute(params)
        self._options = {"train": train, "key": key}

    def has(self, method: str) -> bool:
        """Return whether the network has a method."""
        return self._net.has(method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self._net.precision.cast_to_compute((args, kwargs))
        out, self.state = self._net.apply(
            self._params, self.state, *args, **self._options, **kwargs
        )
        return out


def _loss_fn(net: Functional, task: Task, call: Function) -> Function:
    def loss_fn(
        params: PyTree, batch: Batch, *, key: Key | None = None, model_state: PyTree = None
    ) -> Any:
        if task.augment is not None:
            batch = task.augment(batch, _given(key))
        bound = _Call(net, params, model_state, True, key)
        outputs = call(bound, batch)
        loss = _mean((task.train_loss or task.loss)(outputs, batch), batch)
        aux = {}
        for name, fn in task.metrics.items():
            with naming(name):
                aux[name] = _ratio(fn(outputs, batch), batch, name)
        return (loss, aux) if model_state is None else (loss, aux, bound.state)

    return loss_fn


def _given(key: Key | None) -> Key:
    """Return the key of a step.

    Raises:
      ValueError: for none.
    """
    if key is None:
        raise ValueError(
            "the task changes its batches at random and the loss was called without a key; expected "
            "stepper.init(..., key=...), or loss_fn(..., key=...)"
        )
    return key


def _mean(losses: Any, batch: Batch) -> Any:
    """Return the loss of a batch: a scalar, or a `WeightedLoss` if values have weights."""
    values, _ = values_and_weights(losses)
    if isinstance(losses, tuple) or ("mask" in batch and values.ndim):
        return WeightedLoss(*weighted_sums(losses, batch.get("mask")))
    return values.mean() if values.ndim else values


def _ratio(value: Any, batch: Batch, name: str) -> jax.Array:
    """Return a metric of a batch; 0 where nothing counts."""
    if not isinstance(value, tuple) and "mask" not in batch:
        return values_and_weights(value, name)[0].astype(jnp.float32).mean()
    total, weight = weighted_sums(value, batch.get("mask"), name)
    return total / jnp.where(weight == 0, 1, weight)


def _metrics_fn(net: Functional, task: Task, call: Function) -> Callable[..., dict[str, Any]]:
    def metrics_fn(params: PyTree, batch: Batch, *, model_state: PyTree = None) -> dict[str, Any]:
        outputs = call(_Call(net, params, model_state, False, None), batch)
        loss = task.loss(outputs, batch)  # first, for it checks the outputs
        values = {}
        for name, fn in task.metrics.items():
            with naming(name):
                values[name] = fn(outputs, batch)
        whole = not isinstance(loss, tuple) and values_and_weights(loss)[0].ndim == 0
        return values if whole else values | {"loss": loss}

    return metrics_fn


def _predict_fn(net: Functional, task: Task, call: Function) -> Callable[..., Any]:
    def predict_fn(params: PyTree, batch: Batch, *, model_state: PyTree = None) -> Any:
        outputs = call(_Call(net, params, model_state, False, None), batch)
        return _by_name(outputs if task.predict is None else task.predict(outputs))

    return predict_fn


def _by_name(outputs: Any) -> dict[str, jax.Array]:
    """Return the arrays of outputs by the names of their places.

    Raises:
      ValueError: if two arrays have one name.

    >>> list(_by_name({"mean": jnp.ones(2), "parts": (jnp.ones(2), jnp.ones(2))}))
    ['mean', 'parts.0', 'parts.1']
    >>> list(_by_name((jnp.ones(2), jnp.ones(2)))), list(_by_name(jnp.ones(2)))
    (['output.0', 'output.1'], ['output'])
    """
    outputs = dict(outputs) if isinstance(outputs, Mapping) else {"output": outputs}
    arrays: dict[str, jax.Array] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(outputs):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name in arrays:
            raise ValueError(f"two outputs have the name {name!r}; expected a name for each")
        arrays[name] = jnp.asarray(leaf)
    return arrays


def _generate(net: Functional, generate: Function, spec: DataSpec) -> Callable[..., jax.Array]:
    def generated(params: PyTree, prompt: jax.Array, key: Key, **options: Any) -> jax.Array:
        return generate(_Call(net, params, None, False, None), spec, prompt, key, **options)

    return generated
