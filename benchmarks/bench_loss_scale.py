"""What does a loss scale do for a real float16 run?

Trains a gpt in float16 under a dynamic loss scale and writes down the scale of every step. At a few
steps it forms the gradients of the same parameters and batch three times, in float32, in float16 without a
scale, and in float16 at the run's scale, and counts how many of the numbers that are not zero in float32
are zero in float16, and how far the whole gradient is off (after Micikevicius et al. 2018, "Mixed Precision Training", figure 3).
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from record import RESULTS, device_name, keep

import jmp_train as jt
from jmp_train.config.find import find_experiment
from jmp_train.data.batches import iterate, train_batches
from jmp_train.numerics.histograms import EXPONENTS
from jmp_train.optim import make_optimizer
from jmp_train.reports.plots import plot_exponents
from jmp_train.tasks import make_task


def main() -> None:
    """Trains, counts, prints a table, keeps JSON and two figures."""
    wide = jax.default_backend() != "cpu"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiment", default="gpt_124m_fp16" if wide else "gpt_fp16")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--growth-interval", type=int, default=40)
    options = parser.parse_args()
    experiment = dataclasses.replace(find_experiment(options.experiment), steps=options.steps)
    dataset = experiment.data.load()
    tasks = {
        name: make_task(experiment.model, experiment.task, dataset.spec, name)
        for name in ("float32", "mixed_float16")
    }
    stepper = jt.make_step(
        tasks["mixed_float16"].loss_fn,
        make_optimizer(experiment.optimizer, options.steps),
        "mixed_float16",
        loss_scale=jt.DynamicLossScale(2.0**16, period=options.growth_interval),
    )
    state = stepper.init(jax.jit(tasks["float32"].init)(jax.random.key(0)))
    batches = iterate(train_batches(dataset.train, experiment.batch_size, seed=0))
    count = jax.jit(lambda *given: counted(tasks, *given))
    rows, infos = [], []
    for step in range(options.steps):
        batch = next(batches)
        if step in (1, options.steps // 4, options.steps - 1):
            found = jax.device_get(count(state.params, batch, state.loss_scale.loss_scale))
            rows.append({"step": step, **{k: v.tolist() for k, v in found.items()}})
            print(table_line(rows[-1]))
        state, info = stepper.step(state, batch)
        infos.append((info.loss_scale, info.finite))
    scales = np.array([float(scale) for scale, _ in infos])
    skipped = np.flatnonzero([not bool(finite) for _, finite in infos])
    print(f"{len(skipped)} of {options.steps} steps skipped, last scale {scales[-1]:g}")
    name = f"loss_scale-{device_name()}"
    plot_scales(scales, skipped, RESULTS / f"{name}.png", options)
    last = rows[-1]
    plot_exponents(
        {e: n for e, n in zip(EXPONENTS, last["exponents"], strict=True) if n},
        jnp.float16,
        RESULTS / f"flushed_gradients-{device_name()}.png",
        scale=last["scale"],
        title=f"gradients of {options.experiment} in float32, step {last['step']}",
    )
    result = {
        "gradients": rows,
        "scales": scales.tolist(),
        "skipped_steps": skipped.tolist(),
    }
    print(keep("loss_scale", result, **vars(options)))


def counted(tasks: Any, params: Any, batch: Any, scale: Any) -> dict[str, Any]:
    """Zeros among the gradients, by how they were formed, and their exponents in float32."""

    def grads(name: str, loss_scale: Any) -> Any:
        found = jt.value_and_grad(tasks[name].loss_fn, name, has_aux=True)(
            params, batch, loss_scale=loss_scale
        )
        return found.grads

    exact = grads("float32", None)
    scaled = jt.DynamicLossScale(scale)
    ways = {"unscaled": grads("mixed_float16", None), "scaled": grads("mixed_float16", scaled)}
    nonzero = jax.tree.map(lambda g: g != 0, exact)
    total = sum(m.sum() for m in jax.tree.leaves(nonzero))
    rounded = jt.numerics.shares_in(exact, "float16")
    rounded_scaled = jt.numerics.shares_in(exact, "float16", scale=scale)
    return {
        "scale": scale,
        "numbers": sum(g.size for g in jax.tree.leaves(exact)) * jnp.ones((), jnp.int32),
        "not_zero_in_float32": total,
        **{
            f"zero_in_float16_{way}": sum(
                (m & (g == 0)).sum()
                for m, g in zip(jax.tree.leaves(nonzero), jax.tree.leaves(made), strict=True)
            )
            for way, made in ways.items()
        },
        **{
            f"relative_error_{way}": optax.tree.norm(optax.tree.sub(made, exact))
            / optax.tree.norm(exact)
            for way, made in ways.items()
        },
        "share_flushed_by_rounding": rounded.flushed,
        "share_subnormal_by_rounding": rounded.subnormal,
        "share_flushed_by_rounding_scaled": rounded_scaled.flushed,
        "share_subnormal_by_rounding_scaled": rounded_scaled.subnormal,
        "exponents": jt.numerics.exponent_histogram(exact).counts,
    }


def table_line(row: dict[str, Any]) -> str:
    """One row of the table."""
    total = row["not_zero_in_float32"]
    return (
        f"step {row['step']:4}: of {total} gradients that float32 has, float16 makes "
        f"{100 * row['zero_in_float16_unscaled'] / total:.2f} % zero without a scale and "
        f"{100 * row['zero_in_float16_scaled'] / total:.3f} % at {row['scale']:g}; their relative "
        f"error is {row['relative_error_unscaled']:.2g} and {row['relative_error_scaled']:.2g}"
    )


def plot_scales(scales: np.ndarray, skipped: np.ndarray, path: Any, options: Any) -> None:
    """Draws the loss scale of every step, and the steps that were skipped."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    steps = np.arange(1, len(scales) + 1)
    axes.step(steps, scales, where="post", label="loss scale")
    axes.plot(steps[skipped], scales[skipped], "v", color="C3", label="skipped: overflow")
    axes.set_yscale("log", base=2)
    axes.set(xlabel="step", ylabel="loss scale")
    axes.set_title(f"{options.experiment}, growth after {options.growth_interval} finite steps")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
