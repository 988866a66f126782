"""The check before training that the held-out data and the metrics can be evaluated."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp

from jmp_train.config.experiment import AnyExperiment
from jmp_train.data.batches import eval_batch_size, eval_batches
from jmp_train.data.streams import Stream
from jmp_train.errors import UsageError
from jmp_train.runs.build import Parts
from jmp_train.runs.early_stop import metric_of
from jmp_train.runs.user_code import one_line_errors
from jmp_train.spec import DataSpec
from jmp_train.step.evaluation import make_sums
from jmp_train.tasks.kinds import get_task
from jmp_train.types import Batch

_KINDS = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)


def check_evaluation(experiment: AnyExperiment, parts: Parts) -> None:
    """Check that the held-out data and the metrics can be evaluated, and early stopping has its metric.

    One held-out example is read, or the first batch of a stream. The evaluation is traced on the
    shapes of a whole batch; nothing is compiled or computed.

    Raises:
      UsageError: if there is no held-out example; if the held-out arrays that the task reads are
        missing, or differ from the training data in shape or kind of number; if a metric cannot be
        computed from them, or does not have a value for each example; and for an unknown metric of
        early stopping, with the nearest one.
    """
    held_out, task = parts.dataset.eval, parts.task
    size = eval_batch_size(held_out, experiment.batch_size)
    first = _first(held_out, size if isinstance(held_out, Stream) else 1)
    _compare(first, parts.dataset.spec, get_task(experiment.task).reads)
    batch = {
        name: jax.ShapeDtypeStruct((size, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype))
        for name, x in first.items()
    }
    sums = make_sums(task.metrics_fn, task.precision, cast_batch=False)
    with one_line_errors():
        params, model_state = jax.eval_shape(task.init, jax.random.key(0))
        extras = {} if model_state is None else {"model_state": model_state}
        metrics = jax.eval_shape(sums, params, batch, **extras)
    if experiment.early_stop.metric is not None:
        metric_of(experiment.early_stop, dict.fromkeys(metrics, 0.0))


def _first(held_out: Any, size: int) -> Batch:
    batches: Any = eval_batches(held_out, size)
    with contextlib.closing(batches):  # also the stream that it reads
        batch = next(batches, None)
    if batch is None:
        raise UsageError("the held-out data are empty; expected at least one example")
    return batch


def _compare(held_out: Batch, spec: DataSpec, reads: tuple[str, ...]) -> None:
    """Raise UsageError for arrays that the task reads and that differ from the training data."""
    if not set(reads) <= set(held_out):
        given = " and ".join(name for name in held_out if name != "mask")
        raise UsageError(
            f"the held-out data have {given}; expected {' and '.join(reads)}, which the task reads"
        )
    for name in reads:
        given, wanted = held_out[name], spec.example[name]
        if given.shape[1:] != wanted.shape:
            raise UsageError(
                f"the held-out data have {name!r} of shape {given.shape[1:]}; expected {wanted.shape}, "
                "as the training data have"
            )
        if not any(
            jnp.issubdtype(given.dtype, kind) and jnp.issubdtype(wanted.dtype, kind)
            for kind in _KINDS
        ):
            raise UsageError(
                f"the held-out data have {name!r} of dtype {given.dtype}; expected {wanted.dtype}, as "
                "the training data have"
            )
