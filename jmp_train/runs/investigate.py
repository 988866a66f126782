"""The investigation of a run that diverged: the replay of its last step, and its float32 gradients."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmp_train.config.experiment import AnyExperiment
from jmp_train.data.dataset import Dataset
from jmp_train.debug import NonFiniteReport, first_nonfinite
from jmp_train.loss_scales.states import LossScale, NoOpLossScale, StaticLossScale
from jmp_train.numerics.histograms import EXPONENTS, exponent_histogram, shares_in
from jmp_train.policy.precision import get_precision
from jmp_train.records.metrics import read_metrics, write_json
from jmp_train.reports.advice import advise
from jmp_train.reports.divergence import Divergence, Float32Gradients
from jmp_train.reports.plots import plot_exponents
from jmp_train.reports.progress import print_line
from jmp_train.runs.build import make_task_of
from jmp_train.runs.context import RunContext
from jmp_train.runs.loop import Diverged, LastCall, nonfinite_gradients
from jmp_train.step.gradients import GradResult
from jmp_train.step.state import TrainState
from jmp_train.step.step import step_gradients
from jmp_train.tasks.task import TaskFunctions
from jmp_train.tree import nonfinite_leaves, path_names, widen_to_full
from jmp_train.types import Json, PyTree


def explain(context: RunContext, error: Diverged) -> Diverged:
    """Return the error with the whole report for its message."""
    print_line(context.console, "diverged; looking for what went non-finite first")
    assert error.last is not None
    report = investigate(context, str(error), error.last)
    return Diverged(f"{report}\ndetails are in {context.run_dir / 'diverged.json'}", error.last)


def investigate(context: RunContext, reason: str, last: LastCall) -> Divergence:
    """Return the report on a run that diverged, and write it into the run's directory.

    Args:
      context: the run.
      reason: why it was stopped.
      last: the last call of the step.
    """
    experiment, dataset, state = context.experiment, context.parts.dataset, last.state
    steps = context.checkpoints.steps()
    flags = jax.device_get(jax.jit(nonfinite_leaves)(state.params))
    lost = [n for n, bad in zip(path_names(state.params), flags, strict=True) if bad]
    operations, float32, problems = _replay_last(context, last, replayable=not lost)
    skips = state.last_skip is not None
    history = [r for r in read_metrics(context.run_dir / "metrics.jsonl") if r["split"] == "train"]
    report = Divergence(
        experiment=context.name,
        reason=reason,
        step=last.step,
        policy=experiment.policy,
        rules=experiment.rules,
        loss_scale=last.loss_scale,
        skips=skips,
        history=tuple(history[-20:]),
        gradients=tuple(nonfinite_gradients(state)) if last.skipped else (),
        parameters=tuple(lost),
        operations=operations,
        float32=float32,
        problems=problems,
        advice=advise(
            experiment=experiment,
            operations=operations,
            float32=float32,
            skips=skips,
            loss_scale=last.loss_scale,
            accepts=lambda rules: _accepts(experiment, dataset, rules),
        ),
        checkpoint=steps[-1] if steps else None,
    )
    _write_report(context, report)
    return report


def _replay_last(
    context: RunContext, last: LastCall, *, replayable: bool
) -> tuple[NonFiniteReport | None, Float32Gradients | None, tuple[str, ...]]:
    """Return the replay of the last step, its gradients in float32, and why either is missing."""
    state, operations, float32 = last.state, None, None
    if not (last.skipped and replayable):
        gone = "the step cannot be replayed: its update has already overwritten the last good state"
        return None, None, () if state.last_skip is not None else (gone,)
    # The state before that step, which changed nothing but the counters and the scale.
    scale = scale_of(state, last.loss_scale)
    before = state._replace(step=state.step - 1, loss_scale=scale)
    try:
        operations = replay(context.experiment, context.parts.task, before, last.batch)
        float32 = float32_gradients(context.experiment, context.parts.dataset, before, last)
    # The report matters more than any part of it, so it names a part that fails.
    except Exception as failure:  # noqa: BLE001
        what = f"{type(failure).__name__}: {failure}".splitlines()[0]
        return operations, float32, (f"the last step could not be replayed: {what}",)
    return operations, float32, ()


def _accepts(experiment: AnyExperiment, dataset: Dataset, rules: tuple[str, ...]) -> bool:
    """Return whether the model has the modules that rules name."""
    try:
        experiment.functions(dataset.spec, get_precision("float32", rules))
    except ValueError:
        return False
    return True


def _write_report(context: RunContext, report: Divergence) -> None:
    run_dir, float32 = context.run_dir, report.float32
    with contextlib.suppress(OSError):  # a full disk; the error's message is the report too
        write_json(run_dir / "diverged.json", report.to_json())
        (run_dir / "diverged.txt").write_text(f"{report}\n", encoding="utf-8")
        if float32 is not None and float32.exponents:
            plot_exponents(
                float32.exponents,
                float32.format,
                run_dir / "plots" / "gradient_exponents.png",
                scale=report.loss_scale,
                title=f"{context.name}: gradients at step {report.step}, in float32",
            )


def scale_of(state: TrainState, value: float) -> LossScale:
    """Return the loss scale that a step was taken under, as a static loss scale."""
    none = isinstance(state.loss_scale, NoOpLossScale)
    return state.loss_scale if none else StaticLossScale(value)


def _gradients(experiment: AnyExperiment, task: TaskFunctions) -> Callable[..., GradResult]:
    """Return the gradients of the step, as a function of its state and batch."""
    return step_gradients(
        task.loss_fn,
        task.precision,
        cast_batch=False,
        micro_batches=experiment.micro_batches,
    )


def replay(
    experiment: AnyExperiment, task: TaskFunctions, state: TrainState, batch: PyTree
) -> NonFiniteReport:
    """Return the operations of a step that went non-finite first."""
    grads = _gradients(experiment, task)

    def gradients(params: PyTree, batch: PyTree, model_state: PyTree) -> Json:
        result = grads(state._replace(params=params, model_state=model_state), batch)
        return {"loss": result.loss, "gradient": result.grads}

    return first_nonfinite(gradients, state.params, batch, state.model_state)


def float32_gradients(
    experiment: AnyExperiment, dataset: Dataset, state: TrainState, last: LastCall
) -> Float32Gradients:
    """Return the gradients of a step with the same parameters and batch in float32 throughout."""
    full = dataclasses.replace(
        experiment,
        policy="float32",
        rules=(),
        optimizer=dataclasses.replace(experiment.optimizer, parameters="direct"),
        loss_scale=dataclasses.replace(experiment.loss_scale, kind="none"),
    )
    gradients = _gradients(full, make_task_of(full, dataset.spec))
    state = state._replace(params=widen_to_full(state.params), loss_scale=NoOpLossScale())
    dtype = _narrowest(experiment)

    @jax.jit
    def measure(state: TrainState, batch: PyTree) -> Any:
        result = gradients(state, batch)
        leaves = jax.tree.leaves(result.grads)
        finite = [jnp.where(jnp.isfinite(g), jnp.abs(g), 0).max(initial=0) for g in leaves]
        return (
            result.loss,
            result.finite,
            jnp.stack(finite).max(),
            shares_in(result.grads, dtype, scale=last.loss_scale),
            shares_in(result.grads, dtype),
            exponent_histogram(result.grads).counts,
        )

    loss, finite, largest, scaled, unscaled, counts = jax.device_get(measure(state, last.batch))
    return Float32Gradients(
        loss=float(loss),
        finite=bool(finite),
        largest=float(largest),
        count=sum(x.size for x in jax.tree.leaves(state.params)),
        format=dtype.name,
        shares={k: float(v) for k, v in scaled._asdict().items()},
        shares_unscaled={k: float(v) for k, v in unscaled._asdict().items()},
        exponents={e: int(n) for e, n in zip(EXPONENTS, counts, strict=True) if n},
    )


def _narrowest(experiment: AnyExperiment) -> np.dtype[Any]:
    """Return the narrowest compute dtype of a run; of two as wide, the one of the smaller range."""
    dtypes = [policy.compute_dtype for policy in experiment.precision.policies]
    return min(dtypes, key=lambda dtype: (dtype.itemsize, float(jnp.finfo(dtype).max)))
