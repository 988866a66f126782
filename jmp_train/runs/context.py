"""The values that stay the same while a run lasts."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from jmp_train.config.experiment import AnyExperiment
from jmp_train.records.checkpoints import Checkpoints
from jmp_train.runs.build import Parts


class RunContext(NamedTuple):
    """The values that stay the same while a run lasts."""

    name: str  # of the experiment
    experiment: AnyExperiment
    run_dir: Path
    console: Console
    force: bool  # resume with any settings
    parts: Parts
    checkpoints: Checkpoints
    stopped: list[int]  # the signals that have come
    began: float  # time.perf_counter() at the start of this process's part of the run
    asked_warmup: int  # warm-up steps before they were fitted to the steps of the experiment
