"""How fast are examples read from files, beside Grain by hand, tf.data, PyTorch and Hugging Face?

The same files for all: photographs as JPEG in a folder for each class, resized to 224 by 224 pixels with
and without antialiasing, rows of Parquet files, and text. Each rival makes shuffled batches of the same
arrays, in this process and in worker processes; rates are examples a second over some seconds, after a first
batch, in turn over some rounds. A ratio above 1 is faster than the fastest rival. Rivals that are not
installed are left out.

Then the share of a bundled experiment's step time that its loop waits for data.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import data_rivals
import numpy as np
from data_rivals import Case
from record import keep

from jmp_train.config.find import find_experiment
from jmp_train.data import Data, TextConfig, image_folder, iterate, table, train_batches
from jmp_train.runs.build import build, first_state
from jmp_train.runs.calls import compile_calls

EXPERIMENTS = ("mlp_bf16", "gpt_bf16", "cnn_bf16", "vit_bf16")


def main() -> None:
    """Measure, print tables and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--table-rows", type=int, default=200_000)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60, help="of each experiment")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        cases = data_rivals.write_cases(
            Path(folder), images=options.images, rows=options.table_rows
        )
        rows = [row for case in cases for row in measure(case, options)]
    print(keep("data", rows, **vars(options), load=[load, os.getloadavg()[0]]))
    waits = [waiting(name, options.steps) for name in EXPERIMENTS]
    print(keep("data_waiting", waits, **vars(options), load=[load, os.getloadavg()[0]]))


def measure(case: Case, options: Any) -> list[dict[str, Any]]:
    """Return a row for each rival and number of workers."""
    rivals = {"jmp_train": ours, **data_rivals.RIVALS}
    makes = {
        (name, workers): lambda make=make, workers=workers: make(case, workers)
        for name, make in rivals.items()
        for workers in options.workers
        if installed(name)
    }
    rates: dict[Any, list[float]] = {key: [] for key in makes}
    for _ in range(options.rounds):
        for key, make in makes.items():
            try:
                rates[key].append(rate(make, case, options.seconds))
            except data_rivals.Unable:
                continue
    best = max(
        (statistics.median(r) for (name, _), r in rates.items() if r and name != "jmp_train"),
        default=0.0,
    )
    rows = []
    for (name, workers), found in rates.items():
        if not found:
            continue
        median = statistics.median(found)
        row = {"source": case.name, "reader": name, "workers": workers}
        row |= {"examples_per_second": median, "slowest": min(found), "fastest": max(found)}
        row["ratio"] = median / best if best else None
        rows.append(row)
        line = "{source:14} {reader:14} {workers} workers {examples_per_second:10.0f} examples/s"
        print((line + " [{slowest:.0f}, {fastest:.0f}] {ratio:6.2f}").format(**row), flush=True)
    return rows


def rate(make: Callable[[], Iterator[Any]], case: Case, seconds: float) -> float:
    """Return examples a second, after the first batch."""
    batches = make()
    next(batches)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        next(batches)
        count += case.batch_size
    elapsed = time.perf_counter() - began
    getattr(batches, "close", lambda: None)()
    return count / elapsed


def ours(case: Case, workers: int) -> Iterator[Any]:
    """Return the batches of `train`."""
    path = str(case.folder)
    if case.name.startswith("images"):
        resize = "linear" if case.name == "images, linear" else "antialias"
        data = Data(image_folder, path=path, size=case.size, resize=resize, eval_share=0.02)
    elif case.name == "rows":
        data = Data(table, path=path, label="label", in_memory=False, eval_share=0.02)
    elif case.name == "columns":
        data = Data(table, path=path, label="label", eval_share=0.02)
    else:
        data = TextConfig(path=path, length=case.size, eval_share=0.02)
    return iterate(train_batches(data.load().train, case.batch_size, seed=0, workers=workers))


def installed(name: str) -> bool:
    """Return whether a rival's library is here."""
    library = data_rivals.LIBRARIES.get(name)
    return library is None or importlib.util.find_spec(library) is not None


def waiting(name: str, steps: int) -> dict[str, Any]:
    """Return the share of the step time that a run waits for batches, at the experiment's defaults."""
    experiment = find_experiment(name)
    optimizer = dataclasses.replace(experiment.optimizer, warmup_steps=0)
    every = {"log_every": steps, "eval_every": steps, "checkpoint_every": steps}
    experiment = dataclasses.replace(experiment, steps=steps, optimizer=optimizer, **every)
    parts = build(experiment)
    state = first_state(experiment, parts)
    calls = compile_calls(experiment, parts, state)
    batches = calls.iterate()
    shares = []
    for _ in range(3):
        waited, began = 0.0, time.perf_counter()
        for _ in range(steps // calls.steps):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            state, info = calls.call(state, batch)
            np.asarray(info.loss)  # the batch is asked for when the device has nothing to do
        shares.append(waited / (time.perf_counter() - began))
    batches.close()
    row = {"experiment": name, "steps_per_call": calls.steps, "on_device": calls.data_on_device}
    row |= {"waiting_share": statistics.median(shares), "largest": max(shares)}
    print("{experiment:10} waits {waiting_share:7.2%} of the step time".format(**row), flush=True)
    return row


if __name__ == "__main__":
    main()
