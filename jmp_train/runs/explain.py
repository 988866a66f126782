"""Where the parameters and the state of an experiment lie on a mesh, before anything is trained."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh

from jmp_train.config.experiment import AnyExperiment
from jmp_train.config.warmup import fit_warmup
from jmp_train.errors import UsageError
from jmp_train.runs.build import first_state, load_dataset, make_stepper, make_task_of, parts_of
from jmp_train.runs.devices import check_batch_splits, placement_of
from jmp_train.runs.steps_per_call import bytes_of
from jmp_train.sharding.mesh import AXES, MeshShape
from jmp_train.sharding.placement import Placement
from jmp_train.sharding.placement import table as placement_table
from jmp_train.sharding.sharded import Sharded
from jmp_train.sharding.state import share_bytes


def explain_placement(experiment: AnyExperiment) -> str:
    """Return a table of where each parameter lies, and the bytes of the state on each device.

    The mesh may be one of devices that are not here; -1 in it stands for those that are.

    Raises:
      UsageError: if the data cannot be read; for a mesh that the batch does not divide by, and for rules
        that do not fit the parameters.
    """
    experiment, _ = fit_warmup(experiment)
    task = make_task_of(experiment, load_dataset(experiment).spec)
    shape = MeshShape.parse(experiment.mesh)
    sizes = (shape.data, shape.fsdp, shape.tensor)
    devices = jax.device_count() if -1 in sizes else math.prod(sizes)
    try:
        shape = shape.on(devices)
        mesh: Any = AbstractMesh((shape.data, shape.fsdp, shape.tensor), AXES)
        sharded = Sharded(
            mesh,
            Placement(experiment.placement),
            placement_of(experiment.model),
            annotations=task.annotations(),
        )
        state = jax.eval_shape(
            lambda: first_state(experiment, parts_of(task, make_stepper(experiment, task)))
        )
        placed = sharded.place(state.params)
    except ValueError as error:
        raise UsageError(str(error)) from None
    check_batch_splits(experiment, sharded)
    places = sharded.follow(state, state.params)
    rows = {
        "parameters": (state.params, places.params),
        "optimizer state": (state.opt_state, places.opt_state),
        "moving average": (state.ema, places.ema),
        "model state": (state.model_state, places.model_state),
    }
    lines = [placement_table(placed), ""]
    each = experiment.batch_size // sharded.batch_shards
    lines.append(f"mesh {sharded}: {devices} devices, {each} examples of each batch on each")
    for name, (arrays, own) in rows.items():
        whole, held = bytes_of(arrays), share_bytes(arrays, own)
        if whole:
            lines.append(f"{name}: {held:,} bytes per device of {whole:,} ({held / whole:.1%})")
    whole = [p for p in placed if not any(p.spec)]
    if devices > 1 and whole:
        size = sum(p.bytes for p in whole)
        lines.append(f"on each device whole: {len(whole)} parameters of {size:,} bytes")
    return "\n".join(lines)
