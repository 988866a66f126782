"""Is a plan's memory what a run takes? The peak on this GPU, over what `jmp-train plan` says for it.

    python benchmarks/bench_plan.py [--jobs N]

Each row is a plan for one device and a `jmp-train train` of a few steps, with evaluation and checkpoint, in
processes of their own. The peak is that of XLA's allocator over the whole run.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the processes share the device

import jax
from plans import HERE, Row, plan
from record import keep

KINDS = {"H100": "h100", "H200": "h200", "A100": "a100", "B200": "b200", "4090": "rtx4090"}
SIZES = {
    **{f"gpt_124m_{p}": (8, 1024) for p in ("fp32", "fp16", "bf16")},
    "gpt_1b3_bf16": (4, 2048),
    **{f"{name}_{p}": (64, 1) for name in ("resnet50_224", "vit_b_224") for p in ("fp32", "fp16", "bf16")},
}  # fmt: skip
"""Examples of a batch, and tokens of an example, by experiment."""
STEPS = 4
_CHILD = """
import sys
from jmp_train.cli.main import console_script
try:
    console_script()
finally:
    import jax
    print("peak", jax.devices()[0].memory_stats()["peak_bytes_in_use"])
"""


def measure(name: str, batch: int) -> int:
    """Return the bytes in use at the peak of a run.

    Raises:
      RuntimeError: for a run that fails, with what it said last.
    """
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    every = ("--log-every", "--eval-every", "--checkpoint-every")
    with tempfile.TemporaryDirectory() as folder:
        words = [
            "train",
            name,
            "--batch-size",
            batch,
            "--steps",
            STEPS,
            "--run-dir",
            f"{folder}/run",
        ]
        words += [word for flag in every for word in (flag, STEPS)]
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, *map(str, words)],
            cwd=HERE,
            env={**os.environ, "PYTHONPATH": path},
            check=False,
            capture_output=True,
            text=True,
        )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines[-1].startswith("peak "):
        raise RuntimeError(f"{name}: {done.stderr.strip()[-2000:]}")
    return int(lines[-1].split()[1])


def planned(name: str, device: str, batch: int, length: int) -> dict[str, Any]:
    """Return the plan of a row; what it said if it failed."""
    return plan(Row(name, device, "data=1", batch, length))


def main() -> None:
    """Print and keep each row; a row that fails is said and left out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1, help="plans and runs at a time")
    options = parser.parse_args()
    kind = jax.devices()[0].device_kind
    device = next((name for part, name in KINDS.items() if part in kind), None)
    if device is None:
        print(f"this is a {kind}; expected a GPU that has a plan: {', '.join(KINDS)}")
        return
    rows: dict[str, Any] = {}
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        runs = {name: pool.submit(measure, name, batch) for name, (batch, _) in SIZES.items()}
        plans = {name: pool.submit(planned, name, device, *size) for name, size in SIZES.items()}
        for name, (batch, length) in SIZES.items():
            try:
                peak, found = runs[name].result(), plans[name].result()
            except RuntimeError as error:
                print(error, file=sys.stderr)
                continue
            if "failed" in found:
                print(f"{name}: {found['failed']}", file=sys.stderr)
                continue
            rows[name] = {
                "batch": batch,
                "length": length,
                "planned": found["peak"],
                "measured": peak,
                "measured_over_planned": peak / found["peak"],
            }
            print(json.dumps({name: rows[name]}), flush=True)
            keep("plan", rows, steps=STEPS)


if __name__ == "__main__":
    main()
