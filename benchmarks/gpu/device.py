"""What the rows are measured on: the device, its clocks and limits, and the versions installed.

Asks nvidia-smi and the package metadata, so that neither JAX nor torch takes the device's memory.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import statistics
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

PACKAGES = ("jmp-train", "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax",
            "optax", "numpy", "torch", "triton", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12",
            "nvidia-cublas", "nvidia-cublas-cu12")  # fmt: skip

# Dense TFLOP/s of NVIDIA's data sheets: strict float32, TF32, half precision with float32 sums.
_H100 = {"fp32": 67.0, "tf32": 494.5, "fp16": 989.4, "bf16": 989.4}
_A100 = {"fp32": 19.5, "tf32": 156.0, "fp16": 312.0, "bf16": 312.0}
_DATASHEET = {"H100 80GB HBM3": _H100, "H200": _H100, "A100": _A100}

_FIELDS = {
    "kind": "name",
    "memory": "memory.total",
    "driver": "driver_version",
    "power": "power.limit",
    "sm": "clocks.sm",
    "sm_max": "clocks.max.sm",
    "memory_clock": "clocks.mem",
    "memory_clock_max": "clocks.max.mem",
}

_BUSY = 50.0  # percent of the time with a kernel running, from which a sample counts as busy
_SAMPLED = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "power_w": "power.draw",
    "temperature_c": "temperature.gpu",
    "utilization": "utilization.gpu",
}


def describe() -> dict[str, Any]:
    """The first NVIDIA GPU that is visible, else the CPU: kind, memory, driver, clocks, power limit."""
    found = _nvidia_smi()
    if found is None:
        return cpu()
    clocks = ("sm", "sm_max", "memory_clock", "memory_clock_max")
    mebibytes = _number(found["memory"])
    return {
        "kind": found["kind"],
        "memory_bytes": None if mebibytes is None else int(mebibytes * 2**20),
        "driver": found["driver"],
        "clocks_mhz": {name: _number(found[name]) for name in clocks},
        "power_limit_w": _number(found["power"]),
    }


def cpu() -> dict[str, Any]:
    """This machine's CPU, in the words of `describe`."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    nothing = {"driver": None, "clocks_mhz": {}, "power_limit_w": None}
    return {"kind": "cpu", "memory_bytes": memory, **nothing}


def file_name(kind: str) -> str:
    """The device's part of a result file's name.

    >>> file_name("NVIDIA H100 80GB HBM3")
    'NVIDIA-H100-80GB-HBM3'
    """
    return kind.replace(" ", "-").replace("/", "-")


def datasheet(kind: str, precision: str) -> float | None:
    """TFLOP/s that the data sheet promises; None for a device or a precision that is not known.

    >>> datasheet("NVIDIA H200", "bf16"), datasheet("cpu", "bf16")
    (989.4, None)
    """
    names = () if "NVL" in kind else _DATASHEET  # those cards are slower ones
    found = next((_DATASHEET[name] for name in names if name in kind), {})
    return found.get(precision)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@contextlib.contextmanager
def sampled(every_ms: int = 250) -> Iterator[dict[str, Any]]:
    """Fills the dictionary that it yields with the GPU's state while the block ran.

    Medians over the samples in which a kernel ran at least half of the time: "sm_mhz",
    "memory_mhz", "power_w", "temperature_c"; "sm_mhz_min", the slowest clock among them; and
    "samples", their number. The dictionary stays empty where there is no nvidia-smi, or no sample
    was busy.
    """
    found: dict[str, Any] = {}
    with tempfile.TemporaryFile() as out:
        command = [*_query(_SAMPLED.values()), f"--loop-ms={every_ms}"]
        try:
            smi = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.DEVNULL
            )
        except OSError:
            yield found
            return
        try:
            yield found
        finally:
            smi.kill()
            smi.wait()
            out.seek(0)
            found |= _busy(out.read().decode(errors="replace").splitlines())


def _busy(lines: list[str]) -> dict[str, Any]:
    """Medians over the busy samples among lines of nvidia-smi.

    >>> _busy(["345, 2619, 70.5, 30, 0", "1980, 2619, 650.0, 55, 99", "1755, 2619, 698.0, 61, 100"])
    {'sm_mhz': 1867.5, 'memory_mhz': 2619.0, 'power_w': 674.0, 'temperature_c': 58.0, 'sm_mhz_min': 1755.0, 'samples': 2}
    """
    split = ([_number(value.strip()) for value in line.split(",")] for line in lines)
    whole = [dict(zip(_SAMPLED, s, strict=True)) for s in split if len(s) == len(_SAMPLED)]
    busy = [sample for sample in whole if (sample.pop("utilization") or 0.0) >= _BUSY]
    values = {
        name: [value for sample in busy if (value := sample[name]) is not None]
        for name in _SAMPLED
        if name != "utilization"
    }
    found: dict[str, Any] = {n: statistics.median(v) for n, v in values.items() if v}
    if values["sm_mhz"]:
        found["sm_mhz_min"] = min(values["sm_mhz"])
    return found | {"samples": len(busy)} if busy else {}


def _query(fields: Iterable[str]) -> list[str]:
    """The command that asks nvidia-smi for fields of the first visible GPU."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [*command, f"--id={visible.split(',')[0]}"] if visible else command


def _nvidia_smi() -> dict[str, str] | None:
    command = _query(_FIELDS.values())
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in done.stdout.splitlines()[0].split(",")]
    return dict(zip(_FIELDS, values, strict=True))


def _number(text: str) -> float | None:
    """A field of nvidia-smi, which says "[N/A]" where a device has none."""
    try:
        return float(text)
    except ValueError:
        return None
