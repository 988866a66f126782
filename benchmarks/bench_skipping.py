"""What does it cost to skip non-finite steps, on steps that are finite?

Four ways to take a step in float32, where a step is cheapest and so the share largest: never skip;
compute the update and select (`select_tree`); compute the update only where it is taken (`lax.cond`);
ours without the flags of which gradients were not finite; and ours, `make_step`, which does the latter on a CPU and the former elsewhere, and remembers which
gradients were not finite. The loops are timed in turns; a cost is the median over rounds of this loop's
time over another's in the same round. On a GPU: the same command there. `--target tpu` compiles for a
TPU v5e that need not be there, as bench_memory.py does, and runs nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax
from jax.sharding import SingleDeviceSharding
from record import device_for, keep

import jmp_train as jt
from jmp_train.config import find_experiment
from jmp_train.spec import DataSpec
from jmp_train.tasks import make_task

MLP = find_experiment("mlp_fp32").model
WAYS = ("never", "select", "cond", "unnamed", "jmp_train")
SIZES = {"small": ((256, 256), 128), "10 M": ((2240, 2240, 2240), 16)}


def main() -> None:
    """Measures, prints a table and keeps the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--seconds", type=float, default=0.3, help="of one loop in one round")
    parser.add_argument("--target", default=None)
    options = parser.parse_args()
    if options.target is not None:
        compile_only(device_for(options.target), options)
        return
    rows = []
    for size, (hidden, batch_size) in SIZES.items():
        steps = {way: compiled(way, hidden, batch_size) for way in WAYS}
        seconds = timed({way: call for way, (call, _) in steps.items()}, options)
        for way, (_, cost) in steps.items():
            row = {
                "size": size,
                "way": way,
                "ms_per_step": 1e3 * statistics.median(seconds[way]),
                "over_never": ratio(seconds[way], seconds["never"]),
                "over_select": ratio(seconds[way], seconds["select"]),
                "over_cond": ratio(seconds[way], seconds["cond"]),
                "over_unnamed": ratio(seconds[way], seconds["unnamed"]),
                "megabytes_accessed": cost["bytes accessed"] / 1e6,
                "megaflops": cost["flops"] / 1e6,
            }
            rows.append(row)
            print(
                "{size:6} {way:10} {ms_per_step:8.3f} ms  over never {over_never:.4f}  select "
                "{over_select:.4f}  cond {over_cond:.4f}  unnamed {over_unnamed:.4f}  {megabytes_accessed:.2f} MB  {megaflops:.2f} MFLOP".format(
                    **row
                )
            )
    print(keep("skipping", rows, **vars(options)))


def ratio(ours: list[float], theirs: list[float]) -> float:
    """The median over rounds of one loop's time over another's."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def timed(steps: dict[str, Callable[[], Any]], options: Any) -> dict[str, list[float]]:
    """Seconds a step of each way in each round; the first round only sizes the loops."""
    seconds: dict[str, list[float]] = {way: [] for way in steps}
    one = max(time_of(call, 3) for call in steps.values())
    count = max(1, round(options.seconds / one))
    for number in range(options.rounds):
        ways = list(steps)
        # Each round begins with another way, so that none always follows the same one.
        for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
            seconds[way].append(time_of(steps[way], count))
    return seconds


def time_of(call: Callable[[], Any], count: int) -> float:
    """Seconds of one of `count` calls in a row."""
    out, began = None, time.perf_counter()
    for _ in range(count):
        out = call()
    jax.block_until_ready(out)
    return (time.perf_counter() - began) / count


def compile_only(device: Any, options: Any) -> None:
    """Prints and keeps what each way costs as compiled for a device."""
    placed = SingleDeviceSharding(device)
    rows = []
    for size, (hidden, batch_size) in SIZES.items():
        for way in WAYS:
            state, batch, step = way_to_step(way, hidden, batch_size)
            shapes = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), (state, batch)
            )
            cost = step.lower(*shapes).compile().cost_analysis()
            row = {"size": size, "way": way, "megabytes_accessed": cost["bytes accessed"] / 1e6}
            rows.append(row)
            print("{size:6} {way:10} {megabytes_accessed:.2f} MB".format(**row))
    print(keep(f"skipping-for-{options.target}", rows, compiled_for=device.device_kind))


def compiled(way: str, hidden: tuple[int, ...], batch_size: int) -> tuple[Callable[[], Any], Any]:
    """A call that takes one step, and what XLA counts for it."""
    state, batch, step = way_to_step(way, hidden, batch_size)
    program = step.lower(state, batch).compile()

    def call() -> Any:
        nonlocal state
        state, info = program(state, batch)
        return info

    return call, program.cost_analysis()


def way_to_step(way: str, hidden: tuple[int, ...], batch_size: int) -> tuple[Any, Any, Any]:
    """The first state, a batch, and the jitted step of one way."""
    batch = {
        "image": jax.random.normal(jax.random.key(1), (batch_size, 64)),
        "label": jnp.arange(batch_size) % 10,
    }
    task = make_task(
        dataclasses.replace(MLP, hidden=hidden),
        "classification",
        DataSpec.of(batch, classes=10),
        "float32",
    )
    params = task.init(jax.random.key(0))[0]
    optimizer = optax.adamw(1e-6)
    if way in ("unnamed", "jmp_train"):
        stepper = jt.make_step(task.loss_fn, optimizer, "float32", skip_nonfinite=True)
        state = stepper.init(params)
        if way == "jmp_train":
            return state, batch, stepper.step
        no_flags = lambda grads: jnp.zeros(len(jax.tree.leaves(grads)), jnp.bool_)
        with mock.patch("jmp_train.step.step.nonfinite_leaves", no_flags):
            stepper.step.trace(state, batch)  # now, while the flags are off; kept by the jit
        return state, batch, stepper.step
    state = (params, optimizer.init(params), *(jnp.zeros((), jnp.int32) for _ in range(3)))
    return state, batch, jax.jit(by_hand(way, task.loss_fn, optimizer), donate_argnums=0)


def by_hand(way: str, loss_fn: Any, optimizer: Any) -> Callable[[Any, Any], Any]:
    """A step that skips in one of the ways, with the counters of ours."""
    grad_fn = jt.value_and_grad(loss_fn, "float32", has_aux=True)

    def step(state: Any, batch: Any) -> Any:
        params, opt_state, taken, skipped, in_row = state
        result = grad_fn(params, batch)

        def move(kept: Any) -> Any:
            params, opt_state = kept
            updates, opt_state = optimizer.update(result.grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        kept = (params, opt_state)
        if way == "never":
            return (*move(kept), taken + 1, skipped, in_row), (result.loss, result.aux)
        if way == "cond":
            moved = jax.lax.cond(result.finite, move, lambda kept: kept, kept)
        else:
            moved = jt.select_tree(result.finite, move(kept), kept)
        skipped, in_row = skipped + ~result.finite, jnp.where(result.finite, 0, in_row + 1)
        return (*moved, taken + 1, skipped, in_row), (result.loss, result.aux, result.finite)

    return step


if __name__ == "__main__":
    main()
