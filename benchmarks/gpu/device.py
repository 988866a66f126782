"""What the rows are measured on: the device, its clocks and limits, and the versions installed.

Asks nvidia-smi and the package metadata, so that neither JAX nor torch takes the device's memory.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
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


def _nvidia_smi() -> dict[str, str] | None:
    query = ",".join(_FIELDS.values())
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if visible:
        command.append(f"--id={visible.split(',')[0]}")
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
