"""The plan of a run: memory, communication and time on a named device, found without one."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jmp_train.config.experiment import AnyExperiment
from jmp_train.config.settings import settings_in
from jmp_train.errors import UsageError, nearest
from jmp_train.plan.devices import DEVICES, Device
from jmp_train.runs.directory import config_json
from jmp_train.sharding.mesh import MeshShape
from jmp_train.types import Json

SPARE = 2**30
"""Bytes that the driver, libraries and fragments take beside a program."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an experiment needs on devices."""

    name: str
    device: Device
    mesh: MeshShape
    found: Json
    """What `jmp_train.plan.compiled.plan_step` returned."""
    change: str = ""
    """The options that make it fit, where it does not."""

    @property
    def fits(self) -> bool:
        """Whether a device has room for it."""
        peak = self.found["peak"]
        return "refused" not in self.found and peak + SPARE <= self.device.memory

    @property
    def times(self) -> dict[str, float]:
        """Seconds of a step that products, memory and links take, each if it were alone; without links,
        where the program could not be read."""
        devices = self.mesh.data * self.mesh.fsdp * self.mesh.tensor
        found = self.found
        if "moved_bytes" not in found:
            return {}
        products = sum(
            n / self.device.flops[_rate(dtype)] for dtype, n in found["products"].items()
        )
        times = {
            "products": products / devices,
            "memory": found["moved_bytes"] / self.device.bandwidth,
        }
        if found["collectives"] is not None:
            times["links"] = sum(c["sent"] / _ring(self.device, c) for c in found["collectives"])
        return times

    def to_json(self) -> Json:
        """Return everything as JSON values."""
        return {
            "experiment": self.name,
            "device": self.device.name,
            "mesh": str(self.mesh),
            **self.found,
            "device_memory": self.device.memory,
            "fits": self.fits,
            "seconds": self.times,
            "step_s": max(self.times.values(), default=None),
            "change": self.change,
            "source": self.device.source,
        }


def _ring(device: Device, collective: Json) -> float:
    """Return the bytes a second that a device of a collective sends, by rings.

    Between hosts, each of the devices that it has on a host has its share of the data for its own
    network card, but a device sends no more than its links carry.
    """
    hosts = collective.get("hosts", 1)
    if hosts == 1:
        return device.link
    return min(device.link, device.network * collective["devices"] / hosts)


def _rate(dtype: str) -> str:
    return dtype if dtype in ("bfloat16", "float16") else "float32"


def find_device(name: str) -> Device:
    """Return a device by its name.

    Raises:
      UsageError: for an unknown one, with the nearest.
    """
    if name not in DEVICES:
        raise UsageError(f"device is {name!r}; {nearest(name, DEVICES)}")
    return DEVICES[name]


def make_plan(name: str, experiment: AnyExperiment, device: Device) -> Plan:
    """Return the plan of an experiment; where it does not fit, with the first change that makes it.

    Args:
      name: the name of the experiment, by which another process finds it.
      experiment: with its settings.
      device: the kind of the devices; their number is that of the mesh, and one without a mesh.

    Raises:
      UsageError: for an experiment that cannot be built, or a plug-in that is not installed.
    """
    shape, count = mesh_of(experiment)
    (found,) = compile_for(name, experiment, device, count, [{"mesh": str(shape)}])
    if "error" in found:
        raise UsageError(found["error"])
    plan = Plan(name, device, shape, found)
    if plan.fits:
        return plan
    for changes, text in remedies(experiment, shape):
        (found,) = compile_for(name, experiment, device, count, [{"mesh": str(shape), **changes}])
        if "error" in found:
            continue
        other = Plan(name, device, MeshShape.parse(changes.get("mesh", str(shape))), found)
        if other.fits:
            return dataclasses.replace(plan, change=text)
    return plan


def mesh_of(experiment: AnyExperiment) -> tuple[MeshShape, int]:
    """Return the mesh that an experiment names, and the number of its devices; one without a mesh.

    Raises:
      UsageError: for a mesh with a size of -1.
    """
    shape = MeshShape.parse(experiment.mesh or "data=1")
    sizes = dataclasses.astuple(shape)
    if -1 in sizes:
        raise UsageError(
            f"mesh is {experiment.mesh!r}; expected the number of devices in place of -1, for they are "
            "not here"
        )
    return shape, sizes[0] * sizes[1] * sizes[2]


def remedies(experiment: AnyExperiment, shape: MeshShape) -> list[tuple[Json, str]]:
    """Return changes that save memory, the least costly first, each with what was before it: as
    settings, and as options of the command line."""
    own = settings_in(experiment)
    steps: list[Json] = []
    if shape.data > 1:
        steps.append({"mesh": str(MeshShape(1, shape.fsdp * shape.data, shape.tensor))})
    if own["model"].get("remat") in ("none", "dots"):
        names = ("dots", "full") if own["model"]["remat"] == "none" else ("full",)
        steps += [{"model.remat": name} for name in names]
    count = experiment.micro_batches
    while experiment.batch_size % (2 * count * shape.shards) == 0 and len(steps) < 9:
        count *= 2
        steps.append({"micro_batches": count})
    if own["optimizer"]["parameters"] == "direct" and experiment.policy == "mixed_bfloat16":
        narrow = {"optimizer.parameters": "remainder"}
        steps.append({**narrow, "policy": "params=bfloat16,compute=bfloat16,output=float32"})
    found, so_far = [], {}
    for step in steps:
        so_far = {**so_far, **step}
        text = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in so_far.items())
        found.append((dict(so_far), text))
    return found


def compile_for(
    name: str, experiment: AnyExperiment, device: Device, count: int, tries: Sequence[Json]
) -> list[Json]:
    """Compile an experiment with several changes of its settings, in a process for the device.

    Raises:
      UsageError: if the process ends without an answer, with its last line.
    """
    settings = config_json(name, experiment)
    settings.pop("experiment")
    request = {
        "name": name,
        "settings": settings,
        "device": device.name,
        "count": count,
        "tries": list(tries),
    }
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # another process may compile too
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    if device.platform == "cpu":
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
        environment |= {"XLA_FLAGS": flags}
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        command: list[Any] = [sys.executable, "-m", "jmp_train.plan.compiled", asked, answer]
        done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
        if not answer.exists():
            lines = (done.stderr.strip() or "no message").splitlines()
            raise UsageError(f"the program could not be compiled for {device.name}: {lines[-1]}")
        result = json.loads(answer.read_text(encoding="utf-8"))
    if "error" in result:
        raise UsageError(result["error"])
    return result["plans"]
