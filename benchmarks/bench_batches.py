"""How fast are batches of examples in memory made, beside Grain's own sampler and collation?

The same shuffled batches of the same arrays, made in four ways in one process, in turn: the gather of
`train_batches`, one indexing operation per array and batch; the row numbers alone, as `train` makes them
for arrays that it keeps on the device; Grain's per-example pipeline (`MapDataset.source`, `shuffle`,
`repeat`, `batch`), with its default threads; and the same list of examples through `jmp_train.Data`.
A ratio above 1 is faster than Grain's pipeline.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from record import interleaved, keep

from jmp_train.data import Arrays, Data
from jmp_train.data.batches import iterate, iterate_rows, train_batches
from jmp_train.data.order import Order

SHAPES = {"digits": (8, 8), "32 x 32 x 3": (32, 32, 3)}


def main() -> None:
    """Measure, print a table and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--batches", type=int, default=1_000, help="in a round; many more than are prefetched"
    )
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--examples", type=int, default=4_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rows, load = [], os.getloadavg()[0]
    for case, shape in SHAPES.items():
        rows += measure(case, shape, options)
    print(keep("batches", rows, **vars(options), load=[load, os.getloadavg()[0]]))


def measure(case: str, shape: tuple[int, ...], options: Any) -> list[dict[str, Any]]:
    """Return a row for each way to make batches."""
    rng = np.random.default_rng(0)
    arrays = {
        "image": rng.normal(size=(options.examples, *shape)).astype(np.float32),
        "label": rng.integers(0, 10, options.examples).astype(np.int32),
    }
    examples = [{k: x[i] for k, x in arrays.items()} for i in range(options.examples)]
    size = options.batch_size
    loaded = Data(lambda: examples, classes=10, eval_share=1 / options.examples).load()
    rivals = {
        "Grain": lambda: grains_own(examples, size),
        "train_batches": lambda: iterate(train_batches(Arrays(arrays), size, seed=0)),
        "row numbers": lambda: iterate_rows(Order(options.examples, size, seed=0)),
        "Data of a list": lambda: iterate(train_batches(loaded.train, size, seed=0)),
    }
    loops = {name: takes(make, options.batches) for name, make in rivals.items()}
    seconds = interleaved(loops, rounds=options.rounds)
    rows = []
    for name, s in seconds.items():
        row = {
            "case": case,
            "batches": name,
            "ms_per_batch": 1000 * s["median"] / options.batches,
            "fastest": 1000 * s["min"] / options.batches,
            "slowest": 1000 * s["max"] / options.batches,
            "ratio": seconds["Grain"]["median"] / s["median"],
        }
        rows.append(row)
        line = "{case:12} {batches:16} {ms_per_batch:8.3f} ms [{fastest:.3f}, {slowest:.3f}]"
        print((line + " {ratio:8.2f}").format(**row), flush=True)
    return rows


def grains_own(examples: list[dict[str, np.ndarray]], batch_size: int) -> Iterator[Any]:
    """Return Grain's iterator as its documentation builds it."""
    dataset = grain.MapDataset.source(examples).shuffle(seed=0).repeat().batch(batch_size)
    return iter(dataset.to_iter_dataset())


def takes(make: Callable[[], Iterator[Any]], batches: int) -> Callable[[], None]:
    """Return a function that takes some batches of a new iterator, and ends its threads."""

    def take() -> None:
        iterator = make()
        for _ in itertools.islice(iterator, batches):
            pass
        getattr(iterator, "close", lambda: None)()

    return take


if __name__ == "__main__":
    main()
