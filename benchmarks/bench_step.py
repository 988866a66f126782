"""What does a step of ours cost beside the ways one would write it by hand?

Three loops over the same MLP and batches, for each precision: ours; one written by hand around
`jax.value_and_grad` and Optax; and, in float16, one around Flax's `DynamicScale` and one around jmp.
A ratio below 1 means that ours is quicker.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import flax.training.dynamic_scale
import jax
import jax.numpy as jnp
import jmp
import optax
from record import interleaved, keep

import jmp_train as jt
from jmp_train.config import find_experiment
from jmp_train.data import Arrays, DigitsConfig
from jmp_train.tasks import make_task

MLP = find_experiment("mlp_fp32").model
Loop = Callable[[], Any]


def main() -> None:
    """Measures, prints a table and keeps the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    rows = []
    for policy in ("float32", "mixed_bfloat16", "mixed_float16"):
        loops = make_loops(policy, options.width, options.batch_size, options.steps)
        seconds = interleaved(loops, rounds=options.rounds)
        ours = seconds["jmp_train"]["median"]
        for name, s in seconds.items():
            row = {
                "policy": policy,
                "loop": name,
                "ms_per_step": 1e3 * s["median"] / options.steps,
                "ours_over_this": ours / s["median"],
            }
            rows.append(row)
            print("{policy:15} {loop:22} {ms_per_step:8.3f} ms {ours_over_this:6.3f}".format(**row))
    print(keep("step", rows, **vars(options)))


def make_loops(policy: str, width: int, batch_size: int, steps: int) -> dict[str, Loop]:
    """The loops, each from fresh parameters over the same batch on the device."""
    data = DigitsConfig().load()
    task = make_task(
        dataclasses.replace(MLP, hidden=(width, width)), "classification", data.spec, policy
    )
    params = task.init(jax.random.key(0))[0]
    assert isinstance(data.train, Arrays)
    repeats = -(-batch_size // len(data.train))
    batch = {
        k: jnp.asarray(jnp.concatenate([jnp.asarray(v)] * repeats)[:batch_size])
        for k, v in data.train.arrays.items()
    }
    optimizer = optax.adamw(1e-3)
    stepper = jt.make_step(task.loss_fn, optimizer, policy)

    loops = {"jmp_train": loop_of(stepper.step, (stepper.init(params),), batch, steps)}
    compute = jt.get_policy(policy).compute_dtype
    if compute == jnp.float16:
        loops["Flax DynamicScale"] = flax_loop(task, optimizer, params, batch, steps)
        loops["jmp"] = jmp_loop(task, optimizer, params, batch, steps)
    else:
        loops["hand-written Optax"] = hand_loop(task, optimizer, params, batch, steps, compute)
    return loops


def loop_of(step: Any, state: Any, batch: Any, steps: int) -> Loop:
    """`steps` calls of a step that returns its state before one more value; goes on from call to
    call, so that making the first state is not timed."""

    def loop() -> Any:
        nonlocal state
        for _ in range(steps):
            *state, _ = step(*state, batch)
        return state

    return loop


def hand_loop(task: Any, optimizer: Any, params: Any, batch: Any, steps: int, compute: Any) -> Loop:
    """The loop of a tutorial, with the casts to the compute dtype written in."""

    def step(params: Any, opt_state: Any, batch: Any) -> Any:
        def loss_fn(params: Any) -> Any:
            params, images = jax.tree.map(lambda x: x.astype(compute), (params, batch["image"]))
            return task.loss_fn(params, {**batch, "image": images})

        loss, grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    params = jax.tree.map(jnp.array, params)
    donating = jax.jit(step, donate_argnums=(0, 1))
    return loop_of(donating, (params, optimizer.init(params)), batch, steps)


def flax_loop(task: Any, optimizer: Any, params: Any, batch: Any, steps: int) -> Loop:
    """The loop of Flax's own examples: DynamicScale, and a select over parameters and state."""

    def step(params: Any, opt_state: Any, scale: Any, batch: Any) -> Any:
        def loss_fn(params: Any) -> Any:
            half = jax.tree.map(lambda x: x.astype(jnp.float16), (params, batch["image"]))
            return task.loss_fn(half[0], {**batch, "image": half[1]})

        scale, finite, loss, grads = scale.value_and_grad(loss_fn, has_aux=True)(params)
        updates, new_opt_state = optimizer.update(grads, opt_state, params)
        new = (optax.apply_updates(params, updates), new_opt_state)
        kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, (params, opt_state))
        return *kept, scale, loss

    params = jax.tree.map(jnp.array, params)
    state = (params, optimizer.init(params), flax.training.dynamic_scale.DynamicScale())
    return loop_of(jax.jit(step, donate_argnums=(0, 1)), state, batch, steps)


def jmp_loop(task: Any, optimizer: Any, params: Any, batch: Any, steps: int) -> Loop:
    """The loop of jmp's README."""
    policy = jmp.get_policy("params=float32,compute=float16,output=float32")

    def step(params: Any, opt_state: Any, scale: Any, batch: Any) -> Any:
        def loss_fn(params: Any) -> Any:
            half, inputs = policy.cast_to_compute((params, batch))
            loss, aux = task.loss_fn(half, inputs)
            return scale.scale(loss), (loss, aux)

        grads, loss = jax.grad(loss_fn, has_aux=True)(params)
        grads = scale.unscale(policy.cast_to_param(grads))
        finite = jmp.all_finite(grads)
        scale = scale.adjust(finite)
        updates, new_opt_state = optimizer.update(grads, opt_state, params)
        new = (optax.apply_updates(params, updates), new_opt_state)
        return *jmp.select_tree(finite, new, (params, opt_state)), scale, loss

    params = jax.tree.map(jnp.array, params)
    state = (params, optimizer.init(params), jmp.DynamicLossScale(jnp.asarray(2.0**16)))
    return loop_of(jax.jit(step, donate_argnums=(0, 1)), state, batch, steps)


if __name__ == "__main__":
    main()
