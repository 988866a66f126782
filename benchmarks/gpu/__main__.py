"""Measures the table's rows: `python -m benchmarks.gpu` (make bench-gpu).

Each row runs in a process of its own, `--child ROW`, which prints one JSON object. Started again, it
measures what is missing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import driver, table
from benchmarks.gpu.table import Row, Workload

# Which module makes a row's trainer: by its question where it has one, else by its program.
MAKERS = {
    "jmp_train": "jax_rows",
    "autocast": "jax_rows",
    "apply_policy": "jax_rows",
    "hand-written JAX": "jax_rows",
    "PyTorch": "torch_rows",
    **dict.fromkeys(table.QUESTIONS, "questions"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the driver, or one row in this process; returns the exit status."""
    options = _parser().parse_args(argv)
    if options.child is not None:
        driver.die_with_parent()
        return _child(options)
    if options.profile is not None:
        _module("profile").profile(
            table.row(options.profile), options.toy, options.batch, options.out
        )
        return 0
    return driver.main(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__)
    add = parser.add_argument
    add("--minutes", type=float, default=9.0, help="time for all rows (default: %(default)s)")
    add("--part", type=int, choices=range(1, table.PARTS + 1), help="rows of one part alone")
    add(
        "--only",
        metavar="GLOB",
        nargs="+",
        help="rows whose name matches, such as 'gpt_124m/bf16/*'",
    )
    add("--toy", action="store_true", help="tiny sizes, for a CPU")
    add("--out", type=Path, metavar="FILE", help="result file (default: by the device's name)")
    add("--retry", action="store_true", help="measure rows again that failed or ran out of time")
    add("--jobs", type=int, help="rows at a time (default: 1; 2 with --toy)")
    add("--profile", metavar="ROW", help="time by kind of operation, for one row")
    add("--child", metavar="ROW", help="measure one row in this process; the driver's own use")
    add("--batch", type=int, default=0, help="windows or examples of a step, with --child")
    add("--memory", type=int, default=0, help="bytes of the device, with --child WORKLOAD/batch")
    return parser


def _child(options: argparse.Namespace) -> int:
    """Measures one row and prints the result as the last line; the driver reads errors from stderr."""
    try:
        result = {"status": "ok", **_measured(options)}
    except ModuleNotFoundError as error:
        traceback.print_exc()
        reason = f"{error.name} is not installed" if error.name else str(error)
        result = {"status": "failed", "reason": reason}
    sys.stdout.flush()
    print("\n" + json.dumps(result), flush=True)
    return 0


def _measured(options: argparse.Namespace) -> dict[str, Any]:
    name, _, rest = options.child.partition("/")
    workload = table.workload(name, options.toy)
    if rest == "batch":
        largest = 8 if options.toy else 256
        jax_rows = _module("jax_rows")
        return {"batch": jax_rows.fitting_batch(workload, options.memory, largest)}
    row = table.row(options.child)
    if not options.toy:
        _require_gpu(row)
    if workload.kind == "ceiling":
        return _module("jax_rows").ceiling(row, workload)
    batch = options.batch or workload.batch
    trainer = make(row, workload, batch, options.toy)
    seconds, group_s = (2.0, 0.003) if options.toy else (row.steps_seconds, 0.1)
    return _module("measure").run(trainer, workload, batch, seconds, group_s=group_s)


def _require_gpu(row: Row) -> None:
    """Raises RuntimeError where a row would run on the CPU and be kept as the GPU's."""
    if row.question == "xla_flags":
        return  # these are read when JAX starts; it is given no other platform than the GPU
    if row.program == "PyTorch":
        there = importlib.import_module("torch").cuda.is_available()
    else:
        there = importlib.import_module("jax").default_backend() == "gpu"
    if not there:
        raise RuntimeError(f"{row.id} sees no GPU; expected one")


def make(row: Row, workload: Workload, batch: int, toy: bool) -> Any:
    """The trainer of a row, by the module that knows how; nothing else is imported."""
    return _module(MAKERS[row.question or row.program]).make(row, workload, batch, toy)


def _module(name: str) -> Any:
    return importlib.import_module(f"benchmarks.gpu.{name}")


if __name__ == "__main__":
    sys.exit(main())
