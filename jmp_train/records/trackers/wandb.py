"""Weights & Biases: one run for a run's directory, resumed with it."""

from __future__ import annotations

import os
from pathlib import Path

from jmp_train.records.trackers.tracker import numbers
from jmp_train.types import Json


class Wandb:
    """Passes records to Weights & Biases, as `Tracker`.

    The environment variables of its client apply, such as WANDB_MODE=offline, WANDB_ENTITY and
    WANDB_PROJECT (jmp-train by default).
    """

    def start(self, config: Json) -> None:
        """Create the run, or resume it by its id."""
        import wandb

        run, directory = config["run"], Path(config["run"]["directory"])
        settings = {name: value for name, value in config.items() if name != "run"}
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "jmp-train"),
            id=run["id"],
            name=f"{config['experiment']} {directory.name}",
            resume="allow",
            dir=str(directory),
            settings=wandb.Settings(console="off"),
        )
        self._run.config.update(settings, allow_val_change=True)  # a resume may change some

    def record(self, step: int, split: str, values: Json) -> None:
        """Log the numbers of a record."""
        self._run.log(numbers(split, values), step=step)

    def finish(self, summary: Json) -> None:
        """Put the summary into that of the run, and wait for the upload."""
        self._run.summary.update(summary)
        self._run.finish(exit_code=0 if summary else 1)
