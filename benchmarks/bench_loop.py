"""How fast is `train`'s own loop beside a hand-written loop?

Four loops over the same experiment, in one process, in turn: one written by hand, which dispatches a
jitted step for each batch made ahead; `train`'s loop with its defaults and with one step a call; and
`make_step(...).scan` alone over batches on the device. A ratio above 1 is faster than by hand.
`train`'s loops make their batches and keep records; they do not evaluate or save.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from record import interleaved, keep

from jmp_train.config.find import find_experiment
from jmp_train.optim.optimizers import make_optimizer
from jmp_train.runs.build import Parts, build, first_state
from jmp_train.runs.calls import compile_calls
from jmp_train.runs.loop import Every, run_loop

Loop = Callable[[], Any]


def main() -> None:
    """Measure, print a table and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--large-steps", type=int, default=20, help="of the model of large steps")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    rows, load = [], os.getloadavg()[0]
    for suffix in ("fp32", "fp16", "bf16"):
        for noise in (0.0, 0.2):
            experiment = find_experiment(f"mlp_{suffix}")
            data = dataclasses.replace(experiment.data, noise=noise)
            case = f"mlp_{suffix}, {'noise' if noise else 'no noise'}"
            rows += measure(case, experiment, options.steps, options.rounds, data=data)
    experiment = find_experiment("gpt_fp32")
    rows += measure("gpt_fp32", experiment, options.large_steps, options.rounds)
    print(keep("loop", rows, **vars(options), load=[load, os.getloadavg()[0]]))


def measure(
    case: str, experiment: Any, steps: int, rounds: int, **fields: Any
) -> list[dict[str, Any]]:
    """Return a row for each loop of a case."""
    every = {"log_every": min(100, steps), "eval_every": steps, "checkpoint_every": steps}
    optimizer = dataclasses.replace(experiment.optimizer, warmup_steps=0)
    experiment = dataclasses.replace(
        experiment, steps=steps, optimizer=optimizer, **every, **fields
    )
    parts = build(experiment)
    one = dataclasses.replace(experiment, steps_per_call=1)
    loops = {
        "by hand": hand_loop(experiment, parts),
        "train": train_loop(experiment, parts),
        "train, 1 step a call": train_loop(one, parts),
        "scan alone": scan_loop(experiment, parts),
    }
    rows = []
    seconds = interleaved(loops, rounds=rounds)
    for name, s in seconds.items():
        row = {
            "case": case,
            "loop": name,
            "steps_per_second": steps / s["median"],
            "slowest": steps / s["max"],
            "fastest": steps / s["min"],
            "ratio": seconds["by hand"]["median"] / s["median"],
        }
        rows.append(row)
        line = "{case:20} {loop:22} {steps_per_second:8.1f} steps/s [{slowest:.1f}, {fastest:.1f}]"
        print((line + " {ratio:6.3f}").format(**row), flush=True)
    return rows


def hand_loop(experiment: Any, parts: Parts) -> Loop:
    """A tutorial's loop: a jitted step, casts written in, no loss scale, batches made ahead."""
    compute = experiment.precision.policies[0].compute_dtype
    optimizer = make_optimizer(experiment.optimizer, experiment.steps)
    state = first_state(experiment, parts)
    batches = [parts.batches[n] for n in range(experiment.steps)]

    def cast(tree: Any) -> Any:
        half = lambda x: x.astype(compute) if jnp.issubdtype(x.dtype, jnp.floating) else x
        return jax.tree.map(half, tree)

    def step(params: Any, opt_state: Any, key: Any, batch: Any) -> Any:
        def loss_fn(params: Any) -> Any:
            extras = {} if state.key is None else {"key": key}
            return parts.task.loss_fn(cast(params), cast(batch), **extras)[0]

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, key, loss

    jitted = jax.jit(step, donate_argnums=(0, 1))
    carried = (state.params, optimizer.init(state.params), jax.random.key(0))

    def loop() -> Any:
        nonlocal carried
        for batch in batches:
            *carried, _ = jitted(*carried, batch)
        return carried

    return loop


def train_loop(experiment: Any, parts: Parts) -> Loop:
    """The loop of `train`, without evaluations and checkpoints."""
    state = first_state(experiment, parts)
    calls = compile_calls(experiment, parts, state)
    batches = calls.iterate()
    logged: list[Any] = []

    def loop() -> Any:
        nonlocal state
        state = run_loop(
            calls.call,
            state,
            batches,
            start=0,
            stop=experiment.steps,
            steps_per_call=calls.steps,
            every=Every(experiment.log_every, experiment.steps, experiment.steps),
            log=lambda step, values, state: logged.append(values),
            evaluate=lambda step, state: None,
            checkpoint=lambda step, state, seconds: None,
            skips_nonfinite=state.last_skip is not None,
            last_batch=calls.last_batch,
        ).state
        return state

    return loop


def scan_loop(experiment: Any, parts: Parts) -> Loop:
    """`make_step(...).scan` over batches that are stacked on the device before."""
    state = first_state(experiment, parts)
    per_call = min(50, experiment.steps)
    stacks = []
    for start in range(0, experiment.steps, per_call):
        part = [parts.batches[n] for n in range(start, start + per_call)]
        stacks.append(jax.device_put(jax.tree.map(lambda *x: np.stack(x), *part)))

    def loop() -> Any:
        nonlocal state
        for stack in itertools.islice(stacks, experiment.steps // per_call):
            state, _ = parts.stepper.scan(state, stack)
        return state

    return loop


if __name__ == "__main__":
    main()
