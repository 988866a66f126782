"""How a run is split over devices: its mesh, its placement, and its batches."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from jmp_train.config.experiment import AnyExperiment
from jmp_train.errors import UsageError
from jmp_train.runs.processes import several
from jmp_train.sharding.mesh import MeshShape, batch_sharding, make_mesh
from jmp_train.sharding.placement import Placement
from jmp_train.sharding.sharded import Sharded
from jmp_train.tasks.task import TaskFunctions
from jmp_train.types import PyTree


def sharded_of(
    experiment: AnyExperiment, task: TaskFunctions, devices: Any = None
) -> Sharded | None:
    """Return how a run is split over the devices of all processes; None for a single device.

    Args:
      experiment: its mesh and placement are used.
      task: for the paths and shapes of the parameters.
      devices: the devices; None takes those of all processes.

    Raises:
      UsageError: for a mesh of another number of devices, and a rule that matches no parameter or does
        not divide one.
    """
    devices = jax.devices() if devices is None else devices
    try:
        shape = MeshShape.parse(experiment.mesh).on(len(devices))
        mesh = make_mesh(shape, devices)
        reduce = None if experiment.reduce_dtype == "compute" else experiment.reduce_dtype
        sharded = Sharded(
            mesh,
            Placement(experiment.placement),
            placement_of(experiment.model),
            reduce,
            task.annotations() if mesh.size > 1 else {},
        )
        params, _ = jax.eval_shape(task.init, jax.random.key(0))
        sharded.place(params)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return None if mesh.size == 1 else sharded


def check_batch_splits(experiment: AnyExperiment, sharded: Sharded | None) -> None:
    """Raise UsageError for a batch that the devices cannot share."""
    shards = 1 if sharded is None else sharded.batch_shards
    parts = shards * experiment.micro_batches
    if experiment.batch_size % parts:
        below = max(experiment.batch_size // parts, 1) * parts
        of = f"{shards} devices"
        if experiment.micro_batches > 1:
            of += f" x {experiment.micro_batches} micro-batches"
        raise UsageError(
            f"batch_size is {experiment.batch_size}, and the mesh {sharded} splits it over {of}; "
            f"expected a multiple of {parts}, such as --batch-size {below}, or another --mesh"
        )


def on_this_machine(experiment: AnyExperiment) -> AnyExperiment:
    """Return an experiment that was trained elsewhere, on all devices of this machine if its mesh has
    another number of them."""
    try:
        MeshShape.parse(experiment.mesh).on(jax.device_count())
    except ValueError:
        return dataclasses.replace(experiment, mesh="")
    return experiment


def placement_of(model: Any) -> tuple[str, ...]:
    """Return the placement that the network of a model brings, as its attribute `placement`."""
    found = getattr(model.__configured__.function, "placement", ())
    return found if isinstance(found, tuple) else ()


def put_batch(
    item: PyTree, sharded: Sharded, steps: int = 1, rows: np.ndarray | None = None
) -> PyTree:
    """Send an item of the data to the devices, each its share of every batch.

    Args:
      item: arrays of a batch; with several `steps`, of so many along a leading axis.
      sharded: how the run is split.
      steps: number of batches in the item.
      rows: which rows of the batch the arrays are, ascending, as `own_rows` returns them; None: all.
    """
    axis = int(steps > 1)
    sharding = batch_sharding(sharded.mesh, axis)
    if not several():
        return jax.device_put(item, sharding)

    def put(x: np.ndarray) -> jax.Array:
        shape = list(x.shape)
        if rows is not None:  # the other processes have the others
            shape[axis] *= sharded.batch_shards // len(_own_shards(sharded))

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[axis].indices(shape[axis])
            first = start if rows is None else int(np.searchsorted(rows, start))
            return x[(*[slice(None)] * axis, slice(first, first + stop - start))]

        return jax.make_array_from_callback(tuple(shape), sharding, part)

    return jax.tree.map(put, item)


def own_rows(sharded: Sharded | None, batch_size: int) -> np.ndarray | None:
    """Return the rows of a batch that the devices of this process take, ascending; None for all."""
    if sharded is None or not several():
        return None
    size = batch_size // sharded.batch_shards
    shards = _own_shards(sharded)
    return np.concatenate([np.arange(i * size, (i + 1) * size) for i in shards])


def _own_shards(sharded: Sharded) -> list[int]:
    """Return which parts of a batch the devices of this process take."""
    shards = sharded.batch_shards
    found = batch_sharding(sharded.mesh).addressable_devices_indices_map((shards,)).values()
    return sorted({(index[0].start or 0) if index else 0 for index in found})
