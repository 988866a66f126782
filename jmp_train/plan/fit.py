"""The largest batch that fits on devices, searched for by compiling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from jmp_train.config.experiment import AnyExperiment
from jmp_train.config.settings import settings_in
from jmp_train.errors import UsageError
from jmp_train.plan.devices import GIB, Device
from jmp_train.plan.plan import Plan, compile_for, mesh_of
from jmp_train.sharding.mesh import MeshShape
from jmp_train.types import Json

_LARGEST = 2**16


class Fit(NamedTuple):
    """The largest batch of one choice of settings."""

    settings: Json
    batch_size: int  # 0: not even one example for each part fits
    plan: Plan | None


def largest_batches(
    name: str,
    experiment: AnyExperiment,
    device: Device,
    show: Callable[[str], None] = lambda line: None,
) -> list[Fit]:
    """Return the largest batch that fits in one micro-batch, for each mesh and each `remat` of the model.

    The best comes first: the largest batch, and of equal ones the one with the shortest step. Sizes are
    doubled until one does not fit; the result is the last that did.

    Args:
      name: the name of the experiment.
      experiment: with its settings; its mesh gives the number of devices.
      device: their kind.
      show: called with a line for each program that was compiled.
    """
    shape, count = mesh_of(experiment)
    fits = [
        _largest(name, experiment, device, settings, show)
        for settings in _choices(experiment, shape, count)
    ]
    slowest = lambda plan: max(plan.times.values()) if plan else 0.0
    return sorted(fits, key=lambda fit: (-fit.batch_size, slowest(fit.plan)))


def _choices(experiment: AnyExperiment, shape: MeshShape, count: int) -> Iterator[Json]:
    """Yield settings to try: meshes of the devices with the same `tensor`, and what is computed again."""
    devices = count // shape.tensor
    meshes = {str(shape): shape}
    for fsdp in (devices, 1):
        other = MeshShape(devices // fsdp, fsdp, shape.tensor)
        meshes.setdefault(str(other), other)
    own = settings_in(experiment)["model"].get("remat")
    remats = ("none", "dots", "full") if own in ("none", "dots", "full") else (None,)
    for mesh in meshes:
        for remat in remats:
            yield {"mesh": mesh, **({} if remat is None else {"model.remat": remat})}


def _largest(
    name: str,
    experiment: AnyExperiment,
    device: Device,
    settings: Json,
    show: Callable[[str], None],
) -> Fit:
    shape = MeshShape.parse(settings["mesh"])
    batch_size, best = shape.shards, Fit(settings, 0, None)
    while batch_size <= _LARGEST:
        changes = {**settings, "batch_size": batch_size, "micro_batches": 1}
        count = shape.data * shape.fsdp * shape.tensor
        (found,) = compile_for(name, experiment, device, count, [changes])
        if "error" in found:
            raise UsageError(found["error"])
        plan = Plan(name, device, shape, found)
        peak = found.get("peak")
        size = "more than there is" if peak is None else f"{peak / GIB:.2f} GiB"
        text = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in settings.items())
        show(f"{text}, batch {batch_size}: {size}, {'fits' if plan.fits else 'does not fit'}")
        if not plan.fits:
            break
        best = Fit(settings, batch_size, plan)
        batch_size *= 2
    return best


def fit_report(fits: list[Fit]) -> str:
    """Return the results as a table."""
    rows = [("mesh", "remat", "batch", "GiB", "ms a step or more", "examples a second at most")]
    for fit in fits:
        found = [fit.settings["mesh"], fit.settings.get("model.remat", "-"), str(fit.batch_size)]
        if fit.plan is None:
            rows.append((*found, "-", "-", "-"))
            continue
        seconds = max(fit.plan.times.values())
        peak = fit.plan.found["peak"] / GIB
        rows.append(
            (*found, f"{peak:.2f}", f"{seconds * 1e3:,.2f}", f"{fit.batch_size / seconds:,.0f}")
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    pad = lambda i, cell: cell.ljust(widths[i]) if i < 2 else cell.rjust(widths[i])
    return "\n".join("  ".join(pad(i, cell) for i, cell in enumerate(row)) for row in rows)
