"""Where a train step runs and where its state lies, when there are several devices."""

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


class DataParallel(NamedTuple):
    """The devices that share each batch, by its leading axis; the state is whole on each.

    Losses, metrics and the model state's floating leaves are averaged over the devices, and so are
    gradients, before they are unscaled.

    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> DataParallel(mesh, reduce_dtype="bfloat16").axis_name
    'data'
    """

    mesh: Mesh
    axis_name: str = "data"
    """The mesh axis that shares the batch; `loss_fn` may reduce over it."""
    reduce_dtype: Any = None
    """What gradients are summed over the devices in: "float32", "bfloat16" (half the bytes) or
    "float16"; None for their own dtype, float32 (float64 for float64 parameters)."""


def replicate(state: TrainState, mesh: Mesh) -> TrainState:
    """The state whole on every device of a mesh."""
    return jax.device_put(state, NamedSharding(Mesh(mesh.devices, mesh.axis_names), P()))


def with_parameters(state: TrainState) -> TrainState:
    """The state with what lies elsewhere replicated over the devices of sharded parameters.

    Counters, keys and the loss scale are made on one device; a step would return them replicated,
    and the next would compile for that.
    """
    placed = (x for x in jax.tree.leaves(state.params) if not isinstance(x, Tracer))
    shardings = [x.sharding for x in placed if isinstance(x.sharding, NamedSharding)]
    if not shardings:
        return state
    devices, everywhere = shardings[0].device_set, NamedSharding(shardings[0].mesh, P())

    def place(x: Any) -> Any:
        there = isinstance(x, Tracer) or x.sharding.device_set == devices
        return x if there else jax.device_put(x, everywhere)

    return jax.tree.map(place, state)


def over_devices(
    grad_fn: Callable[..., GradResult], parallel: DataParallel, micro_batches: int
) -> Callable[..., GradResult]:
    """`grad_fn` on each device's share of the batch, everything else being the same on all."""
    mesh, axis_name, _ = parallel
    if axis_name not in mesh.axis_names:
        raise ValueError(
            f"the mesh has no axis {axis_name!r}; {nearest(axis_name, mesh.axis_names)}"
        )
    # By default the axes of `jax.make_mesh` are explicit, and `shard_map` would then refuse a
    # batch that is not sharded yet.
    mesh = Mesh(mesh.devices, mesh.axis_names)
    devices = mesh.shape[axis_name]
    meaning = f"{devices} devices x {micro_batches} micro-batches"

    def local(params: Any, batch: Any, loss_scale: Any, extras: Any) -> Any:
        result = grad_fn(params, batch, loss_scale=loss_scale, **extras)
        aux, model_state = result.aux
        means = jax.tree.map(lambda x: x if x.ndim == 0 else None, aux)
        stacked = jax.tree.map(lambda x: None if x.ndim == 0 else x, aux)
        return result._replace(aux=(means, model_state)), stacked

    # check_vma=False: with it on, a loop in a user's model that starts from zeros is a type error,
    # and gradients are summed in the compute dtype, inside the backward pass.
    sharded = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(), P(axis_name), P(), P()),
        out_specs=(P(), P(axis_name)),
        check_vma=False,
    )

    def shared_out(params: Any, batch: Any, *, loss_scale: Any, **extras: Any) -> GradResult:
        check_batch(batch, devices * micro_batches, meaning)
        result, stacked = sharded(params, batch, loss_scale, extras)
        means, model_state = result.aux
        aux = jax.tree.map(
            lambda a, b: b if a is None else a, means, stacked, is_leaf=lambda x: x is None
        )
        return result._replace(aux=(aux, model_state))

    return shared_out
