"""Runs the rows that are missing, each in a process of its own, and keeps each result at once.

The standard library alone: neither JAX nor torch is imported here, so neither holds the device.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import ctypes
import fcntl
import fnmatch
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import device, table
from benchmarks.gpu.table import Row

ROOT = Path(__file__).resolve().parents[2]
SHORTEST = 30.0  # seconds left below which no row begins
TOY_LIMIT = 120.0
BATCH_LIMIT = 240.0  # compiling two steps
# A toy row is mostly compilation, which XLA for CPUs can do carelessly.
TOY_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def main(options: argparse.Namespace) -> int:
    """Measures what is missing of the selected rows; returns the exit status.

    SIGINT and SIGTERM end it, and the rows under way, at once; what was measured is in the file.
    """
    about = device.cpu() if options.toy else device.describe()
    if about["kind"] == "cpu" and not options.toy:
        print("no NVIDIA GPU is visible; expected one, or --toy for a CPU", file=sys.stderr)
        return 2
    run = Run(options, about)
    run.path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(run.path.parent, os.O_RDONLY)  # whose lock goes with it
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"another run writes to {run.path.parent}; expected one at a time", file=sys.stderr)
        return 2
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupted)
    rows = [row for row in selected(options) if run.is_missing(row)]
    print(f"{len(rows)} rows to measure on {about['kind']}; results go to {run.path}", flush=True)
    jobs = options.jobs or (2 if options.toy else 1)
    pool = concurrent.futures.ThreadPoolExecutor(jobs)
    try:
        for done in [pool.submit(run.measure, row) for row in rows]:
            done.result()
    finally:
        run.stop()
        pool.shutdown(cancel_futures=True)
        os.close(folder)
    left = sum(map(run.is_missing, rows))
    print(f"{len(rows) - left} rows measured, {left} left", flush=True)
    return 0


def selected(options: argparse.Namespace) -> list[Row]:
    """The rows that a command line asks for, in the table's order."""
    return [
        row
        for row in table.ROWS
        if options.part in (None, row.part)
        and any(fnmatch.fnmatchcase(row.id, glob) for glob in options.only or ["*"])
    ]


def limit_of(row: Row, toy: bool) -> float:
    """Seconds after which a row's process is killed."""
    return TOY_LIMIT if toy else row.limit


def command_of(name: str, toy: bool, **numbers: int) -> list[str]:
    """The command line of a row's process.

    >>> command_of("gpt_1b3/batch", True, memory=80)[3:]
    ['--child', 'gpt_1b3/batch', '--toy', '--memory', '80']
    """
    given = [word for key, value in numbers.items() for word in (f"--{key}", str(value))]
    return [
        *(sys.executable, "-m", "benchmarks.gpu", "--child", name),
        *(["--toy"] if toy else []),
        *given,
    ]


class Run:
    """The result file, and the processes that fill it."""

    def __init__(self, options: argparse.Namespace, about: dict[str, Any]):
        self.toy, self.retry = options.toy, options.retry
        self.deadline = time.monotonic() + 60 * options.minutes
        self.path = options.out or result_path(about["kind"], options.toy)
        self._children: set[int] = set()
        self._tried: set[str] = set()
        self._stopped = False
        self._lock = threading.RLock()  # of the file and the processes
        self._batch_lock = threading.Lock()
        self.data: dict[str, Any] = {"batches": {}, "default_batches": [], "rows": {}}
        kept = result_path(about["kind"], options.toy)
        source = self.path if self.path.exists() or options.toy else kept
        if source.exists():
            self.data = _read(source, about["kind"], options.toy) or self.data
        self.data |= {
            "benchmark": "gpu",
            "command": "make bench-gpu" + (" TOY=1" if self.toy else ""),
            "date": time.strftime("%Y-%m-%d"),
            "toy": self.toy,
            "device": about,
            "versions": device.versions(),
        }

    @property
    def left(self) -> float:
        """Seconds left for all rows."""
        return self.deadline - time.monotonic()

    def is_missing(self, row: Row) -> bool:
        """Whether a row is still to be measured."""
        known = self.data["rows"].get(row.id, {}).get("status")
        if known is None:
            return True
        return self.retry and known != "ok" and row.id not in self._tried

    def measure(self, row: Row) -> None:
        """Measures one row and writes the file, where time is left."""
        if not self.toy and row.planned_s > self.left:
            return  # a shorter one may fit
        batch = self._batch(row.workload)
        if self._out_of_time():
            return
        limit = limit_of(row, self.toy)
        began = time.monotonic()
        numbers = {"batch": batch} if batch else {}
        with contextlib.nullcontext({}) if self.toy else device.sampled() as state:
            result = self._child(command_of(row.id, self.toy, **numbers), limit)
        if result is None:
            return
        workload = table.workload(row.workload, self.toy)
        result = {
            "status": result.pop("status"),
            "reason": result.pop("reason", ""),
            "workload": row.workload,
            "precision": row.precision,
            "program": row.program,
            "question": row.question,
            "options": dict(row.options),
            "seconds": round(time.monotonic() - began, 1),
            "measured": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "batch": batch or workload.batch or None,
            "length": workload.length or None,
            **({"device": state} if state else {}),
            **result,
        }
        promised = device.datasheet(self.data["device"]["kind"], row.precision)
        if promised and "model_tflops" in result:
            result["mfu_datasheet"] = result["model_tflops"] / promised
        with self._lock:
            self.data["rows"][row.id] = result
            self._tried.add(row.id)
            self._write()
            print(_line(row, result, self.left), flush=True)

    def stop(self) -> None:
        """Kills the processes under way; their rows stay missing."""
        with self._lock:
            self._stopped = True
            for child in self._children:
                _kill_group(child)

    def _out_of_time(self) -> bool:
        return self._stopped or self.left < (0 if self.toy else SHORTEST)

    def _batch(self, name: str) -> int:
        """The batch that every program gets on a workload, found out once; 0 leaves the workload's."""
        workload = table.workload(name, self.toy)
        if workload.kind != "gpt":
            return 0
        with self._batch_lock:
            if self._wants_batch(name) and not self._out_of_time():
                memory = int(self.data["device"]["memory_bytes"] or 0)
                command = command_of(f"{name}/batch", self.toy, memory=memory)
                result = self._child(command, TOY_LIMIT if self.toy else BATCH_LIMIT)
                if result is None:
                    return workload.batch
                batch = result.get("batch", workload.batch)
                with self._lock:
                    self._tried.add(name)
                    self.data["batches"][name] = batch
                    default = [name] if "batch" not in result else []
                    others = set(self.data["default_batches"]) - {name}
                    self.data["default_batches"] = sorted(others) + default
                    self._write()
                    why = f"; the default, for {result['reason']}" if "reason" in result else ""
                    print(f"{name}: batch {batch}{why}", flush=True)
            return self.data["batches"].get(name, workload.batch)

    def _wants_batch(self, name: str) -> bool:
        """Whether a workload's batch is to be found out: not yet, or in vain and never used."""
        if name not in self.data["batches"]:
            return True
        used = any(
            row["workload"] == name and row["status"] == "ok" for row in self.data["rows"].values()
        )
        failed = name in self.data["default_batches"]
        return failed and not used and name not in self._tried

    def _child(self, command: Sequence[str], limit: float) -> dict[str, Any] | None:
        """What a process says on its last line, or why it said nothing; None where it was cut off."""
        given = min(limit, max(self.left, 0.0))
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            with self._lock:
                if self._stopped:
                    return None
                child = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=_environment(self.toy),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    start_new_session=True,
                )
                self._children.add(child.pid)
            try:
                status = child.wait(given)
            except subprocess.TimeoutExpired:
                status = None
            with self._lock:
                _kill_group(child.pid)  # and what it left behind
                self._children.remove(child.pid)
                child.wait()
            if self._stopped or (status is None and given < limit):
                return None
            if status is None:
                return {"status": "timeout", "reason": f"stopped after {limit:.0f} s"}
            return _answer(out, err, status)

    def _write(self) -> None:
        """Replaces the file in one go, so that a kill leaves the old one or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(temporary, self.path)


def _read(path: Path, kind: str, toy: bool) -> dict[str, Any] | None:
    """The results in a file; None where it cannot be read, and is set aside.

    Raises:
      SystemExit: with status 2 and a line, for results of another device, or of the other size.
    """
    try:
        data = json.loads(path.read_text())
        there = data["device"]["kind"], bool(data["toy"])
        data = {"batches": {}, "default_batches": [], **data, "rows": dict(data["rows"])}
    except (ValueError, KeyError, TypeError):
        aside = path.with_name(f"{path.name}.damaged")
        os.replace(path, aside)
        print(f"{path} cannot be read; it is now {aside.name}", file=sys.stderr)
        return None
    if there != (kind, toy):
        sizes = "toy" if there[1] else "full"
        line = f"{path} holds results of {there[0]} at {sizes} size; expected those of {kind}"
        print(f"{line}: give another --out", file=sys.stderr)
        raise SystemExit(2)
    return data


def result_path(kind: str, toy: bool) -> Path:
    """Where results of a device go."""
    folder = ROOT / ("runs/bench-gpu-toy" if toy else "benchmarks/results")
    return folder / f"gpu-{device.file_name(kind)}.json"


def die_with_parent() -> None:
    """Has the kernel kill this process when the one that started it ends, however it ends (Linux)."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _interrupted(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def _kill_group(child: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)


def _environment(toy: bool) -> dict[str, str]:
    given = os.environ
    changes = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), given.get("PYTHONPATH"))))}
    if toy:
        flags = f"{TOY_FLAGS} {given.get('XLA_FLAGS', '')}".strip()
        changes |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "XLA_FLAGS": flags}
    else:
        # JAX's default of 75 % would be the limit, not the device. It takes one of two names.
        if "XLA_CLIENT_MEM_FRACTION" not in given:
            changes["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.92"
        changes["JAX_PLATFORMS"] = "cuda,cpu"
    return {**given, **changes}


def _answer(out: Any, err: Any, status: int) -> dict[str, Any]:
    lines = _lines(out)
    with contextlib.suppress(ValueError, IndexError):
        found = json.loads(lines[-1])
        if isinstance(found, dict) and "status" in found:
            return found
    reason = _complaint(_lines(err))[:500]
    if status < 0:
        reason = f"killed by {signal.Signals(-status).name}: {reason}"
    return {"status": "failed", "reason": reason}


def _complaint(lines: list[str]) -> str:
    """The line that says what went wrong: the error under a traceback, else the last line.

    >>> _complaint(["Traceback:", "jax.errors.JaxRuntimeError: out of memory", "Allocation: 3"])
    'jax.errors.JaxRuntimeError: out of memory'
    """
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit|Interrupt)\b", line)]
    return (errors or lines or ["no message"])[-1]


def _lines(file: Any) -> list[str]:
    file.seek(0)
    return [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]


def _line(row: Row, result: dict[str, Any], left: float) -> str:
    if result["status"] != "ok":
        figures = f"{result['status']}: {result['reason'][:120]}"
    elif "step_ms" in result:
        memory = result.get("peak_memory_bytes")
        figures = f"{result['step_ms']['median']:9.3f} ms {result['per_second']:12,.0f} "
        figures += f"{result['unit']}/s " + (f"{memory / 2**30:6.2f} GiB" if memory else "")
    else:
        figures = " ".join(f"{result[k]:.1f} {k}" for k in ("tflops", "gb_per_s") if k in result)
    return f"{row.id:52} {figures}  ({left:.0f} s left)"
