"""The header of a run: what trains, on what, in which precision, and where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from jmp_train.data.data import own_of
from jmp_train.data.streams import Stream
from jmp_train.reports.progress import print_header
from jmp_train.runs.context import RunContext
from jmp_train.sharding.sharded import Sharded
from jmp_train.types import PyTree


def show_header(context: RunContext, params: PyTree) -> None:
    """Print the experiment, device, precision, size of the model, data, and run directory.

    Args:
      context: the run.
      params: the parameters of its state.
    """
    experiment, dataset = context.experiment, context.parts.dataset
    rows = {
        "experiment": context.name,
        "device": _device(context.parts.sharded),
        "precision": "\n".join([experiment.policy, *experiment.rules]),
        "parameters": _size(params),
        "data": f"{own_of(experiment.data).name}: {_count(dataset.train)} training examples, "
        f"{_count(dataset.eval)} held out",
        "run": str(context.run_dir),
    }
    if experiment.rules:  # they replace the policy
        rows["precision"] = "\n".join(["by rules, the first match:", *experiment.rules])
    print_header(context.console, rows)


def _count(examples: Any) -> str:
    if isinstance(examples, Stream):
        return "a stream of"
    arrays = isinstance(examples, Mapping)
    count = len(next(iter(examples.values()))) if arrays else len(examples)
    return f"{count:,}"


def _device(sharded: Sharded | None) -> str:
    device = jax.devices()[0]
    name = device.platform
    if device.device_kind != device.platform:
        name = f"{device.device_kind} ({device.platform})"
    return name if sharded is None else f"{sharded.mesh.size} x {name}, mesh {sharded}"


def _size(params: PyTree) -> str:
    leaves = jax.tree.leaves(params)
    dtypes = dict.fromkeys(str(leaf.dtype) for leaf in leaves)
    size, unit = float(sum(leaf.nbytes for leaf in leaves)), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{sum(leaf.size for leaf in leaves):,} in {', '.join(dtypes)}, {size:.4g} {unit}"
