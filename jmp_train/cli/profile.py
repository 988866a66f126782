"""`jmp-train profile NAME`: trace some training steps, for Perfetto."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from jmp_train.cli.compilation_cache import keep_compiled
from jmp_train.cli.options import parse
from jmp_train.cli.positional import take_experiment
from jmp_train.config.experiment import AnyExperiment
from jmp_train.config.find import find_experiment
from jmp_train.runs.folders import results_folder
from jmp_train.runs.profile import profile_experiment


@dataclasses.dataclass(frozen=True)
class ProfileArguments:
    """Trace some training steps of an experiment, for Perfetto."""

    experiment: AnyExperiment
    run_dir: Annotated[
        Path | None, tyro.conf.arg(help_behavior_hint="(default: runs/NAME/TIME)")
    ] = None
    """Directory; the trace is written to its subfolder profile."""
    profile_steps: int = 10
    """Number of steps to trace, after three calls to warm up; rounded up to whole calls."""
    compilation_cache: Annotated[bool, tyro.conf.FlagConversionOff] = True
    """Keep compiled programs in the user's cache folder, so that the next run starts sooner."""

    def __post_init__(self) -> None:
        if self.profile_steps < 1:
            raise ValueError(f"profile_steps is {self.profile_steps}; expected at least 1")


def command(arguments: list[str]) -> None:
    """Trace some steps, and print the path of the trace."""
    name, options = take_experiment(arguments, "profile")
    default = ProfileArguments(find_experiment(name))
    parsed = parse(ProfileArguments, default, options, f"jmp-train profile {name}")
    if parsed.compilation_cache:
        keep_compiled()
    with results_folder(parsed.run_dir, Path("runs") / name) as run_dir:
        trace = profile_experiment(parsed.experiment, run_dir, steps=parsed.profile_steps)
    per_call = parsed.experiment.steps_per_call or 1
    calls = -(-parsed.profile_steps // per_call)
    in_calls = f" ({calls} calls of {per_call})" if per_call > 1 else ""
    print(f"trace of {calls * per_call} steps{in_calls}: {trace}")
    print("open it at https://ui.perfetto.dev; docs/profiling.md says what to look at")
