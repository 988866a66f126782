"""`jmp-train train NAME`: train an experiment, or resume a run."""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from jmp_train.cli.attend import leave
from jmp_train.cli.compilation_cache import keep_compiled
from jmp_train.cli.failures import failure, one_line
from jmp_train.cli.options import parse
from jmp_train.cli.positional import take_experiment
from jmp_train.cli.resume_command import tell_how_to_resume
from jmp_train.config.experiment import AnyExperiment
from jmp_train.config.find import experiment_files, find_experiment
from jmp_train.reports.progress import display_name
from jmp_train.runs.find import RUNS, find_resumable
from jmp_train.runs.folders import results_folder
from jmp_train.runs.processes import Address, is_first, join, noticing_lost, telling_errors
from jmp_train.runs.train import train
from jmp_train.types import Json

_USAGE = """\
usage: jmp-train train NAME [--run-dir DIR | --resume] [--force] [--lr RATE]
                            [--FIELD VALUE ...]

Train an experiment. --run-dir resumes the run in DIR, if there is one; --resume
resumes the newest run in runs/NAME that was started with the same options.
Ctrl-C saves the state and prints the command that resumes.

The fields depend on the experiment; its own help shows each with its value:

  jmp-train train mlp_bf16 --help

Experiments:
"""


@dataclasses.dataclass(frozen=True)
class TrainArguments:
    """Train an experiment, or resume a run."""

    experiment: AnyExperiment
    run_dir: Annotated[
        Path | None, tyro.conf.arg(help_behavior_hint="(default: runs/NAME/TIME)")
    ] = None
    """Directory of the run; an existing run there is resumed."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Resume the newest run in runs/NAME with these settings; with --force, the newest one."""
    compilation_cache: Annotated[bool, tyro.conf.FlagConversionOff] = True
    """Keep compiled programs in the user's cache folder, so that the next run starts sooner."""
    force: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Resume a run of other settings, as far as its state fits."""
    coordinator: str | None = None
    """Host and port of the first of several processes; found under srun, mpirun and on TPU pods."""
    processes: int | None = None
    """Number of processes."""
    process: int | None = None
    """Index of this process, from 0."""
    heartbeat: int = 60
    """Seconds after which a process that does not answer ends the others."""

    def __post_init__(self) -> None:
        if self.resume and self.run_dir is not None:
            raise ValueError(
                f"--resume finds the run in runs/, and --run-dir {self.run_dir} names it; expected one "
                "of the two (--run-dir resumes too)"
            )


def usage() -> str:
    """Return the help of the command without an experiment."""
    names = textwrap.wrap(", ".join(experiment_files()), 78)
    return _USAGE + "".join(f"  {line}\n" for line in names) + "\n"


def command(arguments: list[str]) -> None:
    """Train an experiment, and print its results and its directory."""
    name, options = take_experiment(arguments, "train")
    default = TrainArguments(find_experiment(name))
    parsed = parse(TrainArguments, default, options, f"jmp-train train {name}")
    if parsed.compilation_cache:
        keep_compiled()
    given = parsed.run_dir
    if parsed.resume:
        given = find_resumable(name, parsed.experiment, force=parsed.force)
    address = Address(parsed.coordinator, parsed.processes, parsed.process, parsed.heartbeat)
    join(address)
    with (
        telling_errors(failure, _end_as_another),
        noticing_lost(),
        results_folder(given, RUNS / name) as run_dir,
    ):
        directory = ["--run-dir", str(run_dir)] if parsed.run_dir is None else []
        with tell_how_to_resume(["train", *arguments], directory):
            summary = train(
                parsed.experiment, run_dir, name=name, console=Console(), force=parsed.force
            )
    if is_first():
        print(_results(name, summary))
        print(run_dir)


def _end_as_another(status: int, line: str) -> None:
    """End this process as another one of its run ended."""
    print(f"jmp-train: {one_line(line)}", file=sys.stderr)
    leave(status)


def _results(name: str, summary: Json) -> str:
    metrics = ", ".join(f"{display_name(k)} {v:.4f}" for k, v in summary["eval"].items())
    times = f"{summary['train_time_s']:.1f} s (and {summary['compile_time_s']:.1f} s to compile)"
    lines = [f"{name}: {metrics} on held-out data after {summary['steps']} steps in {times}"]
    for compressor, bits in summary["data"].get("bits_per_byte_of_compressors", {}).items():
        lines.append(
            f"{compressor} on the same text: {bits['alone']:.4f}, or "
            f"{bits['after_training_text']:.4f} after the training text"
        )
    return "\n".join(lines)
