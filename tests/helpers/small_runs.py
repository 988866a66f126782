"""Short runs of the bundled experiments, poisoned data, and a signal at a step."""

import dataclasses
import os
import signal

import numpy as np
from rich.console import Console

from jmp_train.config.find import find_experiment
from jmp_train.data import DigitsConfig
from jmp_train.data.batches import _DRAW
from jmp_train.reports.progress import RunProgress
from jmp_train.sources.random import generator

QUIET = Console(quiet=True)


def small(name="mlp_fp16", **fields):
    """An experiment cut short, with dropout, and an interval of everything within it."""
    experiment = find_experiment(name)
    fields = {"steps": 40, "log_every": 10, "eval_every": 20, "checkpoint_every": 10, **fields}
    sizes = {"hidden": (16,)}
    if name.startswith("gpt"):
        sizes = {"width": 16, "depth": 2, "heads": 2}
        fields |= {"batch_size": 4, "data": dataclasses.replace(experiment.data, length=16)}
    return dataclasses.replace(
        experiment,
        model=dataclasses.replace(experiment.model, **sizes, dropout=0.25),
        optimizer=dataclasses.replace(experiment.optimizer, warmup_steps=5),
        loss_scale=dataclasses.replace(experiment.loss_scale, growth_interval=7),
        **fields,
    )


def signal_at(monkeypatch, at):
    """Send SIGTERM when the record of a step is shown."""
    shown = RunProgress.train

    def then_signal(self, step, values):
        shown(self, step, values)
        if step == at:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunProgress, "train", then_signal)


@dataclasses.dataclass(frozen=True)
class PoisonedDigits(DigitsConfig):
    """Digits, and a NaN in every image of some batches."""

    bad: tuple[int, ...] = ()

    def load(self):
        dataset = super().load()
        states = [str(generator(0, i, _DRAW).bit_generator.state) for i in self.bad]

        def augment(batch, rng):
            poison = np.nan if str(rng.bit_generator.state) in states else 0
            batch = self._add_noise(batch, rng)
            return {**batch, "image": batch["image"] + np.float32(poison)}

        return dataset._replace(train=dataclasses.replace(dataset.train, augment=augment))


def poisoned(*bad, **fields):
    return small("mlp_fp32", data=PoisonedDigits(bad=bad), **fields)
