"""From an experiment to what a run computes with: dataset, task, stepper, batches, evaluation."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jmp_train.config.experiment import AnyExperiment
from jmp_train.data.bad import Bad
from jmp_train.data.batches import eval_batch_size, eval_batches, train_batches
from jmp_train.data.data import own_of
from jmp_train.data.dataset import Dataset
from jmp_train.data.streams import Stream
from jmp_train.errors import UsageError
from jmp_train.optim.optimizers import make_optimizer
from jmp_train.policy.precision import Precision
from jmp_train.runs.devices import own_rows, put_batch, sharded_of
from jmp_train.runs.user_code import check_schedule, one_line_errors
from jmp_train.sharding.sharded import Sharded
from jmp_train.spec import DataSpec
from jmp_train.step.evaluation import make_evaluate
from jmp_train.step.state import TrainState
from jmp_train.step.step import Stepper, make_step
from jmp_train.tasks.task import TaskFunctions
from jmp_train.types import PyTree


class Parts(NamedTuple):
    """The parts that an experiment is built into."""

    dataset: Dataset
    task: TaskFunctions
    stepper: Stepper
    batches: PyTree  # a Grain dataset: one batch for each step
    sharded: Sharded | None  # how it is split over devices; None for a single one
    evaluate: Callable[[TrainState], dict[str, float]]  # on the held-out data
    left_out: list[Bad]  # the examples that the last evaluation left out


def build(experiment: AnyExperiment, run_dir: Path | None = None) -> Parts:
    """Build the parts of an experiment.

    Args:
      experiment: the experiment.
      run_dir: the directory of its run, whose files the data may need, such as a tokenizer.

    Raises:
      UsageError: if the data cannot be read, a rule matches no module, or the learning rate schedule
        cannot be computed.
    """
    dataset = load_dataset(experiment, run_dir)
    task = make_task_of(experiment, dataset.spec)
    with one_line_errors():  # traces the network's initialisation
        sharded = sharded_of(experiment, task)
    metrics_fn = task.metrics_fn if sharded is None else sharded.gathering(task.metrics_fn)
    evaluate = make_evaluate(metrics_fn, task.precision, cast_batch=False)
    size = eval_batch_size(dataset.eval, experiment.batch_size)
    if sharded is not None:
        shards = sharded.batch_shards
        size = -(-size // shards) * shards
    batches = train_batches(
        dataset.train,
        experiment.batch_size,
        seed=experiment.seed,
        workers=dataset.workers,
        rows=own_rows(sharded, experiment.batch_size),
    )
    left_out: list[Bad] = []

    def evaluate_held_out(state: TrainState) -> dict[str, float]:
        left_out.clear()
        held_out: Any = eval_batches(dataset.eval, size, left_out.append)
        if sharded is not None:
            held_out = (put_batch(batch, sharded) for batch in held_out)
        metrics = evaluate(state.eval_params, held_out, state.model_state)
        count = sum(bad.count for bad in left_out)
        return {**metrics, "skipped_examples": float(count)} if count else metrics

    stepper = make_stepper(experiment, task, sharded)
    return Parts(dataset, task, stepper, batches, sharded, evaluate_held_out, left_out)


def parts_of(task: TaskFunctions, stepper: Stepper) -> Parts:
    """Return parts for the shapes of a state, without data and devices."""
    return Parts(None, task, stepper, None, None, None, [])  # pyright: ignore


def load_dataset(experiment: AnyExperiment, run_dir: Path | None = None) -> Dataset:
    """Load the data of an experiment; arguments as in `build`.

    Raises:
      UsageError: if they cannot be read, or are no dataset.
    """
    try:
        load = own_of(experiment.data).load
        takes_directory = "run_dir" in inspect.signature(load).parameters
        dataset = load(run_dir=run_dir) if takes_directory else load()
    except (OSError, ValueError) as error:  # a missing or damaged file
        raise UsageError(str(error)) from None
    if not isinstance(dataset.train, Stream) and not hasattr(dataset.train, "draw"):
        raise UsageError(
            f"{type(experiment.data).__name__}.load() returned a {type(dataset.train).__name__} to train "
            "on; expected a Source, such as Arrays(train) for a dict of arrays"
        )
    return dataset


def make_task_of(
    experiment: AnyExperiment, spec: DataSpec, precision: Precision | None = None
) -> TaskFunctions:
    """Return the task of an experiment on data of a spec, under the experiment's precision by default.

    Raises:
      UsageError: for a rule that matches no module, for data without what the task reads, and for a
        network that cannot be constructed.
    """
    with one_line_errors():
        try:
            return experiment.functions(spec, precision)
        except ValueError as error:
            raise UsageError(str(error)) from None


def make_stepper(
    experiment: AnyExperiment, task: TaskFunctions, sharded: Sharded | None = None
) -> Stepper:
    """Return the train step of an experiment, split over devices or not."""
    if experiment.schedule is not None:
        check_schedule(experiment.schedule)
    return make_step(
        task.loss_fn,
        make_optimizer(
            experiment.optimizer,
            experiment.steps,
            seed=experiment.seed,
            schedule=experiment.schedule,
        ),
        task.precision,
        loss_scale=experiment.loss_scale.make(experiment.precision.default_loss_scale()),
        skip_nonfinite=True if experiment.nonfinite == "skip" else None,
        grad_norm=True,
        cast_batch=False,
        ema_decay=experiment.ema_decay,
        micro_batches=experiment.micro_batches,
        parallel=sharded,
    )


def check_batch_size(experiment: AnyExperiment, dataset: Dataset) -> None:
    """Raise UsageError for a batch of more examples than the dataset has."""
    if isinstance(dataset.train, Stream):  # finds out where it ends
        return
    examples = len(dataset.train)
    if experiment.batch_size > examples:
        raise UsageError(
            f"batch_size is {experiment.batch_size}; expected --batch-size of at most {examples}, the "
            "number of examples to train on"
        )


def first_state(experiment: AnyExperiment, parts: Parts) -> TrainState:
    """Return the state before the first step; on several devices, no part of it is ever whole on one."""
    init_key, step_key = jax.random.split(jax.random.key(experiment.seed))
    places = None
    if parts.sharded is not None:
        shapes = jax.eval_shape(parts.task.init, init_key)
        places = parts.sharded.follow(shapes, shapes[0])
    params, model_state = jax.jit(parts.task.init, out_shardings=places)(init_key)
    return parts.stepper.init(params, model_state=model_state, key=step_key)


def abstract_state(experiment: AnyExperiment, parts: Parts) -> TrainState:
    """Return the shapes and dtypes of a state, and where each array lies."""
    state = jax.eval_shape(lambda: first_state(experiment, parts))
    if parts.sharded is None:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        places = jax.tree.map(lambda x: device, state)
    else:
        places = parts.sharded.follow(state, state.params)
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.tree.map(place, state, places)


def matmul_precision(precision: str) -> contextlib.AbstractContextManager[None]:
    """Set JAX's precision of float32 matrix products, as a context; "default" leaves it."""
    if precision == "default":
        return contextlib.nullcontext()
    return jax.default_matmul_precision(precision)
