"""Compiles the step of an experiment for a device that is not here, in a process of its own.

The plug-ins of GPUs and TPUs write to standard error and keep the process to one kind of device, so
`jmp_train.plan.plan` starts this file with a request, and reads the answer from a file.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from jmp_train._jaxpr.flops import OTHER, flops_by_dtype
from jmp_train.config.experiment import AnyExperiment
from jmp_train.config.find import find_experiment
from jmp_train.config.settings import flatten, with_settings
from jmp_train.config.warmup import fit_warmup
from jmp_train.errors import UsageError
from jmp_train.models.attention import compiled_for
from jmp_train.plan.devices import DEVICES, Device, host_of, target_config, tpu_topology
from jmp_train.plan.program import Program
from jmp_train.runs.build import first_state, load_dataset, make_stepper, make_task_of, parts_of
from jmp_train.runs.devices import check_batch_splits, sharded_of
from jmp_train.sharding.mesh import batch_sharding
from jmp_train.sharding.state import share_bytes
from jmp_train.spec import DataSpec
from jmp_train.tasks.task import TaskFunctions
from jmp_train.types import Json, PyTree


def devices_of(device: Device, count: int) -> list[Any]:
    """Return so many devices to compile for.

    Raises:
      UsageError: if the plug-in of their platform is not installed, or there is no slice of the number.
    """
    from jax.experimental import topologies

    if device.platform == "cpu":
        return jax.devices()[:count]
    try:
        if device.platform == "cuda":
            host = host_of(device, count) or count
            topology = f"1x{count // host}x{host}"
            options: Json = {"target_config": target_config(device), "topology": topology}
            found = topologies.get_topology_desc(platform="cuda", topology_name="", **options)
            return list(found.devices)
        name = tpu_topology(device, max(count, 4) if device.name != "tpu-v5e" else count)
        options = {"chips_per_host_bounds": (1, 1, 1)} if count == 1 else {}
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
        return list(found.devices)[:count]
    except ValueError as error:
        raise UsageError(str(error).splitlines()[0]) from None
    except Exception as error:
        raise UsageError(
            f"programs for {device.name} cannot be compiled here: {str(error).splitlines()[0]}; expected "
            "the extra: pip install 'jmp-train[plan]'"
        ) from error


def lower_step(
    experiment: AnyExperiment, spec: DataSpec, device: Device, count: int
) -> tuple[Any, Json]:
    """Return the step of an experiment, lowered for devices, and what is known of it before it is compiled.

    Sizes are those of one device; operations are those of all.

    Raises:
      UsageError: for a mesh, a batch or rules that do not fit.
    """
    platform = "gpu" if device.platform == "cuda" else device.platform
    with compiled_for(platform):
        return _lowered(experiment, spec, device, count)


def _lowered(
    experiment: AnyExperiment, spec: DataSpec, device: Device, count: int
) -> tuple[Any, Json]:
    task = make_task_of(experiment, spec)
    devices = devices_of(device, count)
    sharded = sharded_of(experiment, task, devices)
    check_batch_splits(experiment, sharded)
    alone = make_stepper(experiment, task)
    state = jax.eval_shape(lambda: first_state(experiment, parts_of(task, alone)))
    batch = {
        name: jax.ShapeDtypeStruct((experiment.batch_size, *x.shape), x.dtype)
        for name, x in spec.example.items()
    }
    if sharded is None:
        places = jax.tree.map(lambda x: SingleDeviceSharding(devices[0]), (state, batch))
    else:
        shares = jax.tree.map(lambda x: batch_sharding(sharded.mesh), batch)
        places = sharded.follow(state, state.params), shares
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), (state, batch), places
    )
    flops = flops_by_dtype(jax.make_jaxpr(alone.pure_step)(state, batch).jaxpr)
    products = {dtype: n for dtype, n in flops.items() if dtype != OTHER}
    own: Json = {
        "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(state.params)),
        "flops": sum(flops.values()),
        "products": products,
        "arguments": {
            "parameters": share_bytes(state.params, places[0].params),
            "optimizer": share_bytes(state.opt_state, places[0].opt_state),
            "average": share_bytes(state.ema, places[0].ema),
            "other state": share_bytes(
                state._replace(params=None, opt_state=None, ema=None),
                places[0]._replace(params=None, opt_state=None, ema=None),
            ),
            "batch": share_bytes(batch, places[1]),
        },
        "gradients": _gradient_bytes(state.params, places[0].params),
        "activations": _activation_bytes(experiment, task, state, batch)
        // (1 if sharded is None else sharded.batch_shards),
    }
    stepper = make_stepper(experiment, task, sharded)
    jitted = jax.jit(stepper.pure_step, donate_argnums=0, out_shardings=(places[0], None))
    return jitted.lower(*placed), own


def compile_lowered(lowered: Any) -> Any:
    """Return a lowered program, compiled.

    Without a GPU, XLA's tiling of some float32 products fails, as of a ViT-B for 224 pixels; they are left
    to cuBLAS then.
    """
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "find output tile sizes" not in str(error):
            raise
        return lowered.compile(compiler_options={"xla_gpu_enable_triton_gemm": False})


def plan_step(experiment: AnyExperiment, spec: DataSpec, device: Device, count: int) -> Json:
    """Compile the step of an experiment for devices, and return what its program needs, as JSON.

    Arguments and errors as of `lower_step`.
    """
    lowered, own = lower_step(experiment, spec, device, count)
    began = time.perf_counter()
    try:
        compiled = compile_lowered(lowered)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        line = str(error).splitlines()[0]
        needed = re.search(r"\(([\d.]+)([GM])\) exceeds", line)
        units = {"G": 2**30, "M": 2**20}
        temporary = int(float(needed[1]) * units[needed[2]]) if needed else None
        arguments = sum(own["arguments"].values())
        peak = None if temporary is None else arguments + temporary
        return {**own, "refused": line, "peak": peak}
    memory = compiled.memory_analysis()
    program, unread = None, ""
    try:
        program = Program(compiled.as_text(), host_of(device, count))
    except jax.errors.JaxRuntimeError as error:
        if device.platform != "tpu":
            raise
        unread = str(error).splitlines()[0]  # libtpu may make what this jaxlib does not know
    # Programs of TPUs hand arrays on through fusions that do not read them, so that what moves cannot be
    # told. There, state and activations count, written and read once each.
    moved = 2 * (sum(own["arguments"].values()) + own["activations"])
    if program is not None and device.platform != "tpu":
        moved = program.bytes_moved()
    arguments, outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes
    temporary = memory.temp_size_in_bytes
    return {
        **own,
        "compile_s": time.perf_counter() - began,
        "argument_bytes": arguments,
        "temporary_bytes": temporary,
        "peak": arguments + outputs - memory.alias_size_in_bytes + temporary,
        "moved_bytes": moved,
        "collectives": None if program is None else [
            {"kind": c.kind, "dtype": c.dtype, "devices": c.devices, "count": c.count,
             "bytes": c.bytes, "sent": c.sent, "hosts": c.hosts}
            for c in program.collectives()
        ],
        "unread": unread,
    }  # fmt: skip


def _gradient_bytes(params: PyTree, places: PyTree) -> int:
    """Return the bytes of float32 gradients of the shares of one device."""
    wide = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32), params)
    return share_bytes(wide, places)


def _activation_bytes(
    experiment: AnyExperiment, task: TaskFunctions, state: Any, batch: PyTree
) -> int:
    """Return the bytes that the forward pass keeps for the backward pass, for all examples together.

    Those of one micro-batch; without the parameters themselves, cast or not.
    """
    part = {
        k: jax.ShapeDtypeStruct((x.shape[0] // experiment.micro_batches, *x.shape[1:]), x.dtype)
        for k, x in batch.items()
    }
    options: Json = {} if state.model_state is None else {"model_state": state.model_state}
    options["key"] = state.key

    def kept(params: PyTree, batch: PyTree, options: Json) -> Any:
        cast = task.precision.cast_to_compute
        loss = lambda p: task.loss_fn(p, batch, **options)[0]
        total = lambda p: getattr(loss(p), "total", loss(p))
        return jax.vjp(total, cast(params))[1]

    shapes = {tuple(x.shape) for x in jax.tree.leaves(state.params)}
    leaves = jax.tree.leaves(jax.eval_shape(kept, state.params, part, options))
    return sum(
        math.prod(x.shape) * x.dtype.itemsize for x in leaves if tuple(x.shape) not in shapes
    )


def main(request: Path, answer: Path) -> None:
    """Answer a request, both of them files of JSON; a refusal is an answer."""
    asked = json.loads(request.read_text(encoding="utf-8"))
    device = DEVICES[asked["device"]]
    try:
        experiment = with_settings(find_experiment(asked["name"]), flatten(asked["settings"]))
        spec = load_dataset(experiment).spec
        found = []
        for changes in asked["tries"]:
            tried, _ = fit_warmup(with_settings(experiment, changes))
            try:
                found.append(plan_step(tried, spec, device, asked["count"]))
            except (UsageError, ValueError) as error:
                found.append({"error": str(error)})
        result: Json = {"plans": found}
    except (UsageError, ValueError) as error:
        result = {"error": str(error)}
    answer.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
