"""Placement of a train step and its state on several devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jmp_train.errors import nearest
from jmp_train.step.accumulation import check_batch
from jmp_train.step.gradients import GradResult
from jmp_train.step.state import TrainState
from jmp_train.types import DTypeLike, PyTree


class DataParallel(NamedTuple):
    """Data parallelism: each device takes a share of each batch and a full copy of the state.

    A batch is split over the devices by its leading axis. Losses, metrics, gradients (before they
    are unscaled) and the floating leaves of the model state are averaged over the devices.

    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> DataParallel(mesh, reduce_dtype="bfloat16").axis_name
    'data'
    """

    mesh: Mesh
    axis_name: str = "data"
    """Mesh axis that the batch is split over; `loss_fn` may reduce over it."""
    reduce_dtype: DTypeLike | None = None
    """Dtype of the sum of gradients over the devices: "float32", "bfloat16" (half the bytes) or
    "float16"; None for the dtype of the gradients: float32 (float64 for float64 parameters)."""


def replicate(state: TrainState, mesh: Mesh) -> TrainState:
    """Copy a state to every device of a mesh."""
    return jax.device_put(state, NamedSharding(Mesh(mesh.devices, mesh.axis_names), P()))


def with_parameters(state: TrainState) -> TrainState:
    """Replicate the rest of a state over the devices of its sharded parameters.

    Counters, keys and the loss scale are created on one device. The first step would return them
    replicated, and the second step would be compiled again for that placement.
    """
    placed = (x for x in jax.tree.leaves(state.params) if not isinstance(x, Tracer))
    shardings = [x.sharding for x in placed if isinstance(x.sharding, NamedSharding)]
    if not shardings:
        return state
    devices, everywhere = shardings[0].device_set, NamedSharding(shardings[0].mesh, P())

    def place(x: jax.Array) -> jax.Array:
        there = isinstance(x, Tracer) or x.sharding.device_set == devices
        return x if there else jax.device_put(x, everywhere)

    return jax.tree.map(place, state)


def over_devices(
    grad_fn: Callable[..., GradResult], parallel: DataParallel, micro_batches: int
) -> Callable[..., GradResult]:
    """Run `grad_fn` on the share of the batch of each device; the other arguments are replicated.

    Raises:
      ValueError: if the mesh does not have the axis; when traced, if the batch does not split.
    """
    mesh, axis_name, _ = parallel
    if axis_name not in mesh.axis_names:
        raise ValueError(
            f"the mesh has no axis {axis_name!r}; {nearest(axis_name, mesh.axis_names)}"
        )
    # The axes of `jax.make_mesh` are explicit by default. With explicit axes, `shard_map` refuses
    # a batch that is not sharded yet.
    mesh = Mesh(mesh.devices, mesh.axis_names)
    devices = mesh.shape[axis_name]
    meaning = f"{devices} devices x {micro_batches} micro-batches"

    def local(params: PyTree, batch: PyTree, loss_scale: Any, extras: Any) -> PyTree:
        result = grad_fn(params, batch, loss_scale=loss_scale, **extras)
        aux, model_state = result.aux
        means = jax.tree.map(lambda x: x if x.ndim == 0 else None, aux)
        stacked = jax.tree.map(lambda x: None if x.ndim == 0 else x, aux)
        return result._replace(aux=(means, model_state)), stacked

    # check_vma=True would make a loop that starts from zeros in a user's model a type error, and
    # would sum gradients in the compute dtype, inside the backward pass.
    sharded = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(), P(axis_name), P(), P()),
        out_specs=(P(), P(axis_name)),
        check_vma=False,
    )

    def shared_out(params: PyTree, batch: PyTree, *, loss_scale: Any, **extras: Any) -> GradResult:
        check_batch(batch, devices * micro_batches, meaning)
        result, stacked = sharded(params, batch, loss_scale, extras)
        means, model_state = result.aux
        aux = jax.tree.map(
            lambda a, b: b if a is None else a, means, stacked, is_leaf=lambda x: x is None
        )
        return result._replace(aux=(aux, model_state))

    return shared_out
