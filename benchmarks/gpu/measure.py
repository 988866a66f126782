"""Times a trainer, whatever framework it is made with; runs in a row's own process."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from benchmarks.gpu.table import Workload

WARMUP = 3  # calls of `step`; the first compiles where `make` did not
SAMPLES = 20  # timed groups of calls, at least
LOSSES_AT = (1, 10, 20, 50, 100)  # steps whose loss is kept


class Trainer(NamedTuple):
    """A train step with the device's state inside it."""

    step: Callable[[Any], Any]
    """One call on a batch from `put`; returns the last step's loss on the device, asynchronously."""
    put: Callable[[dict[str, np.ndarray]], Any]
    """Puts int32 and float32 arrays on the device; they have a leading axis of `steps_per_call`
    where that is above 1."""
    wait: Callable[[Any], float]
    """Waits for the device to be done with a loss, and returns it."""
    peak_memory: Callable[[], int | None]
    """Bytes of the device at the peak; None where that is not known."""
    skipped: Callable[[], int]
    """Steps that were skipped so far."""
    parameters: int
    compile_s: float | None
    """Seconds to lower and compile; None lets `run` time the first step."""
    steps_per_call: int = 1


def batches(workload: Workload, batch: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches without end; batch n is the same for every program.

    Args:
      workload: "gpt" gives `tokens`, int32 (batch, length + 1); "mlp" gives `image`, float32
        (batch, features), and `label`, int32 (batch,); "resnet" and "vit" give images (batch, height,
        width, 3).
      batch: windows or examples.

    Raises:
      ModuleNotFoundError: for the digits where scikit-learn is not installed.
    """
    rng = np.random.default_rng(0)
    if workload.kind == "gpt":
        from pydoc_data.topics import topics

        text = "".join(topics[name] for name in sorted(topics)).encode()
        windows = np.lib.stride_tricks.sliding_window_view(
            np.frombuffer(text, np.uint8), workload.length + 1
        )
        while True:
            yield {"tokens": windows[rng.integers(0, len(windows), batch)].astype(np.int32)}
    if workload.name == "mlp_digits":
        from sklearn.datasets import load_digits

        digits: Any = load_digits(return_X_y=True)
        images, labels = digits
        while True:
            drawn = rng.integers(0, len(images), batch)
            image = (images[drawn] / 16).astype(np.float32)
            yield {"image": image, "label": labels[drawn].astype(np.int32)}
    if workload.kind in ("resnet", "vit"):
        # Each class has a pattern of 8 x 8 colours, which noise hides.
        patterns = rng.standard_normal((workload.classes, 8, 8, 3), np.float32)
        place = np.arange(workload.features) * 8 // workload.features
        while True:
            label = rng.integers(0, workload.classes, batch).astype(np.int32)
            image = patterns[label][:, place][:, :, place]
            image = image + rng.standard_normal(image.shape, np.float32)
            yield {"image": image, "label": label}
    teacher = rng.standard_normal((workload.features, workload.classes), np.float32)
    while True:
        image = rng.standard_normal((batch, workload.features), np.float32)
        yield {"image": image, "label": (image @ teacher).argmax(-1).astype(np.int32)}


def run(
    trainer: Trainer, workload: Workload, batch: int, seconds: float, *, group_s: float = 0.1
) -> dict[str, Any]:
    """Warms a trainer up, times its steps and follows its loss.

    Calls are timed in groups, each ended by a wait for the device, so that the wait itself costs
    little.

    Args:
      trainer: fresh.
      workload: of the trainer.
      batch: windows or examples of a step.
      seconds: after 20 groups and this time no further step is taken, even before step 100.
      group_s: seconds of a group, at least.

    Returns:
      The fields of the result file that a child knows: `step_ms`, `per_second`, `unit`,
      `model_tflops`, `peak_memory_bytes`, `compile_s`, `loss_100`, `loss_first` (None where the
      loss of such a step was not seen), `losses` by step, `skipped` (of the first 100 steps, where
      so many were taken), `parameters`, `batch`, `length`.

    Raises:
      FloatingPointError: where a loss is not finite.
    """
    per_call = trainer.steps_per_call
    pool = _pool(trainer, workload, batch)
    kept: dict[int, Any] = {}
    calls, skipped = 0, None

    def call() -> Any:
        nonlocal calls, skipped
        loss = trainer.step(pool[calls % len(pool)])
        calls += 1
        if calls * per_call in LOSSES_AT:
            kept[calls * per_call] = loss
        if calls * per_call == LOSSES_AT[-1]:
            skipped = trainer.skipped()  # waits for the device: one sample of twenty or more
        return loss

    def timed(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count - 1):
            call()
        trainer.wait(call())
        return time.perf_counter() - began

    started = time.perf_counter()
    first = timed(1)
    once = min(timed(1) for _ in range(WARMUP - 1))
    group = max(1, math.ceil(group_s / once))
    samples: list[float] = []
    while len(samples) < SAMPLES or (
        calls * per_call < LOSSES_AT[-1] and time.perf_counter() - started < seconds
    ):
        samples.append(timed(group) / (group * per_call))

    q1, median, q3 = statistics.quantiles(samples, n=4)
    of_batch = batch * (workload.length if workload.kind == "gpt" else 1)
    losses = {str(step): trainer.wait(loss) for step, loss in kept.items()}
    for step, loss in losses.items():
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss of step {step} is {loss}; expected a finite number")
    return {
        "step_ms": {
            "median": 1e3 * median,
            "q1": 1e3 * q1,
            "q3": 1e3 * q3,
            "steps": len(samples) * group * per_call,
        },
        "per_second": of_batch / median,
        "unit": workload.unit,
        "model_tflops": 1e-12 * workload.flops(trainer.parameters) * of_batch / median,
        "peak_memory_bytes": trainer.peak_memory(),
        "compile_s": first if trainer.compile_s is None else trainer.compile_s,
        "loss_first": losses.get("1"),
        "loss_100": losses.get("100"),
        "losses": losses,
        "skipped": trainer.skipped() if skipped is None else skipped,
        "parameters": trainer.parameters,
        "batch": batch,
        "length": workload.length or None,
    }


def _pool(trainer: Trainer, workload: Workload, batch: int) -> list[Any]:
    """The batches that the steps use in turn, on the device before anything is timed."""
    source = batches(workload, batch)
    if trainer.steps_per_call == 1:
        return [trainer.put(next(source)) for _ in range(workload.pool)]
    together = []
    for _ in range(max(1, workload.pool // trainer.steps_per_call)):
        parts = [next(source) for _ in range(trainer.steps_per_call)]
        together.append(trainer.put({k: np.stack([p[k] for p in parts]) for k in parts[0]}))
    return together
