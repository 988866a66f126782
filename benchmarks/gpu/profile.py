"""Where a step's time goes: a trace of `jax.profiler`, summed up by kind of operation.

`python -m benchmarks.gpu --profile ROW` prints the table and keeps it in the row of the result file.
On a GPU, kernels are counted on their streams; on a CPU, operations on the threads of XLA's client.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu import device, driver, measure, table
from benchmarks.gpu.table import Row

STEPS = 5
# The first pattern that occurs in the name of a kernel or of its operation decides.
KINDS = {
    "attention": r"sdpa|fmha|flash|attention",
    "collective": r"nccl|all-?_?reduce|all-?_?gather|reduce-?_?scatter|all-?_?to-?_?all|collective",
    "matrix product": r"gemm|nvjet|cublas|cutlass|matmul|xmma|ynn_fusion|(^|[ _])dot([ _.]|$)",
    "reduction": r"reduce(?!-?_?precision)|softmax",
    "copy": r"copy|memcpy|memset|transpose|slice|concatenate|gather|scatter|pad",
    "elementwise fusion": r"fusion|wrapped|convert|broadcast|add|multiply|select|tanh|exp",
}
OTHER, IDLE = "other", "idle/gap"
# They last as long as what they run, which is counted by itself.
_CONTAINER = re.compile(r"(while|conditional|call)(\.\d+)?$")


class Event(NamedTuple):
    """An operation that ran on a device; microseconds."""

    name: str
    start: float
    end: float


def profile(row: Row, toy: bool, batch: int = 0, out: Path | None = None) -> list[dict[str, Any]]:
    """Traces a few steps of a row, prints the table of kinds and keeps it in the result file.

    Args:
      row: of a program in JAX.
      toy: whether to use the toy sizes.
      batch: windows or examples of a step; 0 for that of the result file, or the workload's.
      out: the result file; by default the device's.

    Returns:
      What `by_kind` does.

    Raises:
      ValueError: for a row that has no steps, or whose program is not in JAX.
    """
    workload = table.workload(row.workload, toy)
    if row.program == "PyTorch" or workload.kind == "ceiling":
        raise ValueError(f"row is {row.id!r}; expected one with steps in JAX, which traces them")
    about = device.cpu() if toy else device.describe()
    if about["kind"] == "cpu" and not toy:
        raise SystemExit("no NVIDIA GPU is visible; expected one, or --toy for a CPU")
    path = out or driver.result_path(about["kind"], toy)
    known = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    batch = batch or known.get("batches", {}).get(row.workload) or workload.batch
    os.environ.update(driver._environment(toy))  # before JAX is imported
    kinds = by_kind(trace(row, batch, toy), STEPS)
    print(f"{row.id}, batch {batch}, {STEPS} steps on {about['kind']}\n{text_of(kinds)}")
    if keep(path, row.id, kinds):
        print(f"kept in {path}")
    else:
        print(f"not kept: {path} has no such row yet; measure it first")
    return kinds


def trace(row: Row, batch: int, toy: bool, steps: int = STEPS) -> list[dict[str, Any]]:
    """The events that `jax.profiler` writes for some steps of a row, after three to warm up."""
    from benchmarks.gpu.__main__ import make

    workload = table.workload(row.workload, toy)
    trainer = make(row, workload, batch, toy)
    import jax  # after `make`, which may set flags of XLA

    (example,) = measure._pool(trainer, dataclasses.replace(workload, pool=1), batch)
    for _ in range(measure.WARMUP):
        trainer.wait(trainer.step(example))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            losses = [trainer.step(example) for _ in range(steps)]
            trainer.wait(losses[-1])
        (path,) = Path(folder).rglob("*.trace.json.gz")
        return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def by_kind(trace_events: Iterable[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """The device's time by kind of operation.

    Args:
      trace_events: of Chrome's trace format, as `jax.profiler` writes it.
      steps: that were traced.

    Returns:
      For each kind `kind`, `ms` a step and `share` of the sum, the largest first; "idle/gap" is the
      time between the first operation and the last in which none ran.

    Raises:
      ValueError: for a trace without operations of a device.

    >>> lane = {"ph": "X", "pid": 1, "tid": 1, "args": {"hlo_op": ""}}
    >>> events = [{**lane, "name": "dot.1", "ts": 0, "dur": 3000}]
    >>> events += [{**lane, "name": "copy.2", "ts": 4000, "dur": 1000}]
    >>> [(k["kind"], k["ms"]) for k in by_kind(events, steps=1)]
    [('matrix product', 3.0), ('copy', 1.0), ('idle/gap', 1.0)]
    """
    events = device_events(list(trace_events))
    if not events:
        raise ValueError("the trace has no operations of a device; expected some of a jitted step")
    spent: dict[str, float] = {}
    for event in events:
        kind = kind_of(event.name)
        spent[kind] = spent.get(kind, 0.0) + event.end - event.start
    spent[IDLE] = idle(events)
    whole = sum(spent.values())
    return [
        {"kind": kind, "ms": round(1e-3 * us / steps, 6), "share": us / whole}
        for kind, us in sorted(spent.items(), key=lambda item: -item[1])
    ]


def device_events(trace_events: Sequence[dict[str, Any]]) -> list[Event]:
    """The operations that ran on GPUs' streams; where there is no GPU, on the CPU client's threads."""
    processes, threads = {}, {}
    for e in trace_events:
        if e.get("ph") == "M" and e.get("name") == "process_name":
            processes[e["pid"]] = e["args"]["name"]
        if e.get("ph") == "M" and e.get("name") == "thread_name":
            threads[e["pid"], e["tid"]] = e["args"]["name"]
    gpus = {pid for pid, name in processes.items() if name.startswith("/device:GPU")}

    def is_counted(e: dict[str, Any]) -> bool:
        if e.get("ph") != "X":
            return False
        if gpus:  # its other lanes repeat the streams' time by operation and by module
            lane = threads.get((e["pid"], e["tid"]), "")
            return e["pid"] in gpus and lane.startswith("Stream")
        return "hlo_op" in e.get("args", {})

    found = []
    for e in filter(is_counted, trace_events):
        name = " ".join(dict.fromkeys([e["name"], e.get("args", {}).get("hlo_op", "")])).strip()
        if not _CONTAINER.match(name):
            found.append(Event(name, e["ts"], e["ts"] + e.get("dur", 0.0)))
    return found


def kind_of(name: str) -> str:
    """The kind of an operation by its name.

    >>> kind_of("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3")
    'attention'
    >>> kind_of("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT custom-call.12")
    'matrix product'
    >>> kind_of("loop_multiply_fusion_3"), kind_of("input_reduce_fusion"), kind_of("MemcpyD2D")
    ('elementwise fusion', 'reduction', 'copy')
    """
    for kind, pattern in KINDS.items():
        if re.search(pattern, name.lower()):
            return kind
    return OTHER


def idle(events: Iterable[Event]) -> float:
    """Microseconds between the first start and the last end in which no event ran.

    >>> idle([Event("a", 0, 10), Event("b", 5, 12), Event("c", 15, 20)])
    3
    """
    gaps, until = 0, None
    for event in sorted(events, key=lambda e: e.start):
        if until is not None:
            gaps += max(0, event.start - until)
        until = event.end if until is None else max(until, event.end)
    return gaps


def text_of(kinds: Iterable[dict[str, Any]]) -> str:
    """The table as text."""
    lines = [f"{'kind':20} {'ms a step':>10} {'share':>7}"]
    lines += [f"{k['kind']:20} {k['ms']:10.3f} {100 * k['share']:6.1f} %" for k in kinds]
    return "\n".join(lines)


def keep(path: Path, row_id: str, kinds: list[dict[str, Any]]) -> bool:
    """Writes the table into a measured row of a result file; whether there is such a row."""
    if not path.exists():
        return False
    data = json.loads(path.read_text())
    if row_id not in data["rows"]:
        return False
    data["rows"][row_id]["profile"] = kinds
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(partial, path)
    return True
