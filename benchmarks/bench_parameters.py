"""What do the ways with bfloat16 parameters cost in bytes and time, and what do they save?

An MLP on handwritten digits, trained at a learning rate so low that most updates are below half a
spacing of bfloat16 and are lost where parameters are bfloat16 and nothing else. Beside it, on a
larger MLP: bytes per parameter, summed over the arrays of parameters and optimizer state, and the
time of an optimizer step relative to float32 parameters.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from record import interleaved, keep

import jmp_train as jt
from jmp_train.config import find_experiment
from jmp_train.data import Arrays, DigitsConfig
from jmp_train.optim import OptimizerConfig, make_optimizer
from jmp_train.tasks import make_task

MLP = find_experiment("mlp_fp32").model
WAYS = ("float32", "direct", "master", "remainder", "stochastic", "kahan")
RATES = {"adamw": 5e-5, "lion": 2e-5, "sgd": 1e-3, "muon": 2e-4}


def main() -> None:
    """Measures, prints a table and keeps the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4000, help="of the training")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--width", type=int, default=512, help="of the timed MLP's hidden layers")
    parser.add_argument("--rounds", type=int, default=15, help="timed, of 10 steps each")
    options = parser.parse_args()
    rows = []
    for name in RATES:
        timed = {way: timed_step(name, way, options.width) for way in WAYS}
        seconds = interleaved(
            {way: work for way, (work, _) in timed.items()}, rounds=options.rounds
        )
        for way in WAYS:
            row = {
                "optimizer": name,
                "parameters": way,
                "bytes_per_parameter": timed[way][1],
                **trained(name, way, options.steps, options.batch_size),
                "ms_per_step": 1e2 * seconds[way]["median"],
                "time_over_float32": seconds[way]["median"] / seconds["float32"]["median"],
            }
            rows.append(row)
            print(
                "{optimizer:6} {parameters:11} {bytes_per_parameter:6.2f} B  loss {train_loss:7.4f} "
                "accuracy {accuracy:6.4f}  {ms_per_step:7.2f} ms {time_over_float32:5.2f}x".format(
                    **row
                ),
                flush=True,
            )
    print(keep("parameters", rows, **vars(options), learning_rates=RATES))


def policy_of(way: str) -> jt.Policy:
    """bfloat16 compute and float32 output for all; only the stored dtype differs."""
    stored = "float32" if way == "float32" else "bfloat16"
    return jt.Policy(stored, "bfloat16", "float32")


def optimizer_of(name: Any, way: Any, steps: int) -> optax.GradientTransformationExtraArgs:
    """The optimizer as an experiment makes it."""
    way = "direct" if way == "float32" else way
    config = OptimizerConfig(name=name, learning_rate=RATES[name], parameters=way)
    return make_optimizer(config, steps)


def trained(name: str, way: str, steps: int, batch_size: int) -> dict[str, float]:
    """Loss over the training set and accuracy on the held-out one, after equal training."""
    data, policy = DigitsConfig().load(), policy_of(way)
    task = make_task(dataclasses.replace(MLP, hidden=(256,)), "classification", data.spec, policy)
    stepper = jt.make_step(task.loss_fn, optimizer_of(name, way, steps), policy)
    first = make_task(
        dataclasses.replace(MLP, hidden=(256,)), "classification", data.spec, "float32"
    ).init
    assert isinstance(data.train, Arrays)
    train = data.train.arrays
    state = stepper.init(first(jax.random.key(0)), key=jax.random.key(1))
    rng = np.random.default_rng(0)  # the same batches for all
    for _ in range(steps // 500):
        chosen = rng.integers(0, len(data.train), (500, batch_size))
        state, _ = stepper.scan(state, {k: jnp.asarray(v[chosen]) for k, v in train.items()})
    loss, _ = jax.jit(task.loss_fn)(state.params, train, key=None)
    metrics = jax.jit(task.metrics_fn)(state.params, data.eval)
    return {"train_loss": float(loss), "accuracy": float(jnp.mean(metrics["accuracy"]))}


def timed_step(name: str, way: str, width: int) -> tuple[Callable[[], Any], float]:
    """Ten updates without a model, and the bytes that a parameter takes between two of them."""
    shapes = {"w1": (width, width), "b1": (width,), "w2": (width, width), "b2": (width,)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    stored = policy_of(way).param_dtype
    params = {
        k: jax.random.normal(key, shape).astype(stored)
        for (k, shape), key in zip(shapes.items(), keys, strict=True)
    }
    optimizer = optimizer_of(name, way, steps=10**6)
    state = (params, jax.jit(optimizer.init)(params))
    size = sum(x.nbytes for x in jax.tree.leaves(state))

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: Any) -> Any:
        params, opt_state = state
        grads = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def work() -> Any:
        nonlocal state
        for _ in range(10):
            state = update(state)
        return state

    return work, size / sum(x.size for x in jax.tree.leaves(params))


if __name__ == "__main__":
    main()
