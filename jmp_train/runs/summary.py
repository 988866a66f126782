"""The summary of a run: summary.json, and the plots beside it."""

from __future__ import annotations

import contextlib
from typing import Any

import jax

from jmp_train.data.data import own_of
from jmp_train.records.checkpoints import NotSaved
from jmp_train.records.metrics import read_metrics, write_json
from jmp_train.records.provenance import device_and_versions
from jmp_train.reports.plots import plot_run
from jmp_train.runs.calls import Calls
from jmp_train.runs.context import RunContext
from jmp_train.runs.loop import LoopResult
from jmp_train.types import Json


def summarize(
    context: RunContext,
    result: LoopResult,
    evaluation: dict[str, float],
    *,
    calls: Calls,
    train_time_s: float,
    wall_time_s: float,
    rollbacks: int,
    skipped_examples: int,
    ended: Json | None,
) -> Json:
    """Return the content of summary.json.

    Args:
      context: the run.
      result: how its loop ended.
      evaluation: the metrics of the last step; empty where that step was not evaluated.
      calls: its compiled calls of the step.
      train_time_s: seconds in training steps, those before a resume included.
      wall_time_s: seconds in all, those before a resume included.
      rollbacks: how often the run was rolled back.
      skipped_examples: number of training examples that were left out because they were bad.
      ended: how a hook ended the run before its last step; None if none did.
    """
    experiment = context.experiment
    scale, skipped = jax.device_get((result.state.loss_scale, result.state.skipped))
    return {
        "experiment": context.name,
        "policy": experiment.policy,
        "seed": experiment.seed,
        "steps": result.step,
        "wall_time_s": wall_time_s,
        "compile_time_s": calls.compile_time_s,
        "train_time_s": train_time_s,
        "steps_per_second": result.step / train_time_s if train_time_s else 0.0,
        "steps_per_call": calls.steps,
        "data_on_device": calls.data_on_device,
        "eval": evaluation,
        "loss_scale": float(scale.loss_scale),
        "skipped_steps": int(skipped),
        "skipped_examples": skipped_examples,
        "rollbacks": rollbacks,
        "stopped_early": ended,
        "parameters": sum(x.size for x in jax.tree.leaves(result.state.params)),
        "peak_memory_bytes": _peak_memory(calls.memory),
        "data": {"name": own_of(experiment.data).name, **context.parts.dataset.facts()},
        **device_and_versions(),
    }


def _peak_memory(memory: Any) -> int | None:
    """Return the bytes of the compiled step's arguments, results and temporaries together."""
    if memory is None:  # a backend that does not say
        return None
    whole = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return whole - memory.alias_size_in_bytes


def write_summary(context: RunContext, summary: Json, *, finished: bool) -> None:
    """Write summary.json, and draw the plots of a finished run.

    Raises:
      NotSaved: if a finished run's cannot be written.
    """
    run_dir = context.run_dir
    try:
        write_json(run_dir / "summary.json", summary)
        if finished:
            plot_run(
                read_metrics(run_dir / "metrics.jsonl"),
                run_dir / "plots",
                title=f"{context.name}, policy {context.experiment.policy}",
            )
    except OSError as error:
        with contextlib.suppress(OSError):  # so that the next call writes them all
            (run_dir / "summary.json").unlink()
        if finished:
            raise NotSaved(
                f"summary.json and the plots cannot be written: {error.strerror}; the checkpoint of "
                f"step {summary['steps']} is whole, and the same command again writes them"
            ) from None
