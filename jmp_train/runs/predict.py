"""Texts continued by a run of a language model."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from jmp_train.config.experiment import AnyExperiment
from jmp_train.config.warmup import fit_warmup
from jmp_train.errors import UsageError
from jmp_train.reports.stages import stage
from jmp_train.runs.build import build, matmul_precision
from jmp_train.runs.resume import restore_newest


def predict_run(
    run_dir: Path,
    experiment: AnyExperiment,
    prompt: bytes,
    *,
    length: int,
    temperature: float,
    seed: int,
    console: Console | None = None,
) -> bytes:
    """Continue a text with the newest checkpoint of a run.

    Args:
      run_dir: the directory of the run.
      experiment: what was trained, with the settings that `read_config` returns.
      prompt: at least one byte.
      length: bytes to add.
      temperature: divisor of the logits before a byte is drawn; 0 takes the likeliest byte.
      seed: random seed of the draws.
      console: where to show what is done; None shows nothing.

    Returns:
      The bytes that follow the prompt.

    Raises:
      UsageError: if the run has no checkpoint, or its model does not continue texts.
      NoUsableCheckpoint: if none can be loaded.
    """
    console = Console(quiet=True) if console is None else console
    experiment, _ = fit_warmup(experiment)
    with matmul_precision(experiment.matmul_precision):
        with stage(console, "loading data"):
            parts = build(experiment)
        if parts.task.generate is None:
            raise UsageError(
                f"{run_dir} holds a run on {experiment.data.name}, whose model does not continue "
                "texts; expected a run of a language model, such as gpt_bf16"
            )
        with stage(console, "restoring a checkpoint"):
            params = restore_newest(run_dir, experiment, parts).state.eval_params
        generate = jax.jit(parts.task.generate, static_argnames="length")
        with stage(console, "generating"):
            tokens = generate(
                params,
                np.frombuffer(prompt, np.uint8),
                jax.random.key(seed),
                length=length,
                temperature=temperature,
            )
            return bytes(np.asarray(tokens, np.uint8))
