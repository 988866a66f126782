"""How a benchmark times its rivals, and how its result is kept: JSON with device and versions."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from rich.console import Console

from jmp_train.records.metrics import write_json
from jmp_train.runs.compare import compare, markdown_table
from jmp_train.testing.training import equivalence

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("jmp-train", "jax", "jaxlib", "flax", "optax", "jmp", "jaxamp")


def interleaved(
    rivals: Mapping[str, Callable[[], Any]], *, rounds: int
) -> dict[str, dict[str, float]]:
    """Times each rival once a round, so that a machine that slows down slows all of them.

    Args:
      rivals: by name; each does its work and returns arrays that are waited for.
      rounds: timed rounds, after one that is not.

    Returns:
      By name, seconds: the median, the quickest and the slowest.
    """
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for number in range(rounds + 1):
        for name, work in rivals.items():
            began = time.perf_counter()
            jax.block_until_ready(work())
            if number:
                seconds[name].append(time.perf_counter() - began)
    return {
        name: {"median": statistics.median(s), "min": min(s), "max": max(s)}
        for name, s in seconds.items()
    }


def device_for(target: str | None) -> Any:
    """The device to compile for: the one at hand, or one of a TPU that need not be there."""
    if target is None:
        return jax.devices()[0]
    if target != "tpu":
        raise SystemExit(f"unknown target {target!r}; expected 'tpu', or none for the device here")
    found = importlib.util.find_spec("libtpu")
    if found is None or found.origin is None:
        raise SystemExit("libtpu is not installed; pip install the version that jax[tpu] asks for")
    os.environ.setdefault("TPU_LIBRARY_PATH", str(Path(found.origin).parent / "libtpu.so"))
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]


def device_name() -> str:
    """The device as a file name: cpu, NVIDIA-H200."""
    return jax.devices()[0].device_kind.replace(" ", "-")


def keep(name: str, rows: Any, **settings: Any) -> Path:
    """Writes benchmarks/results/NAME-DEVICE.json.

    Args:
      name: of the benchmark.
      rows: what was measured.
      settings: sizes and counts that it was measured with.
    """
    device = jax.devices()[0]
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{device_name()}.json"
    command = " ".join(["python", "benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]])
    write_json(
        path,
        {
            "benchmark": name,
            "command": command,
            "date": time.strftime("%Y-%m-%d"),
            "device": {"platform": device.platform, "kind": device.device_kind},
            "cpu": {"machine": platform.machine(), "count": os.cpu_count()},
            "versions": {"python": platform.python_version(), **versions},
            "settings": settings,
            "rows": rows,
        },
    )
    return path


def keep_comparison(
    name: str, family: str, variants: dict[str, Any], *, margin: float, options: Any
) -> None:
    """Runs `compare`, tests each variant for equivalence with the first, and keeps JSON, table and plot.

    Args:
      name: of the benchmark.
      family: of the experiments.
      variants: experiments by label.
      margin: of the family's metric.
      options: the benchmark's; its `seeds` are used, all are kept.
    """
    out = Path(tempfile.mkdtemp())
    try:
        result = compare(family, variants, seeds=options.seeds, out=out, console=Console())
        rows, metric = result["rows"], result["metric"]
        first, *others = rows
        for label in others if options.seeds > 1 else ():
            values = (rows[row][metric]["values"] for row in (label, first))
            found = equivalence(*values, margin=margin)._asdict()
            rows[label] |= {"against": first, "equivalence": found}
            print(
                f"{label} - {first}: {metric} {found['difference']:+.4f}, 90 % interval "
                f"[{found['low']:+.4f}, {found['high']:+.4f}], margin {margin}: "
                f"{'equivalent' if found['equivalent'] else 'not shown to be equivalent'}"
            )
        print(keep(name, rows, margin=margin, **vars(options)))
        (RESULTS / f"{name}-{device_name()}.md").write_text(markdown_table(result))
        shutil.copy(out / "compare.png", RESULTS / f"{name}-{device_name()}.png")
    finally:
        shutil.rmtree(out)
