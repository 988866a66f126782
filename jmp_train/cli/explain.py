"""`jmp-train explain NAME`: where the parameters of an experiment lie on a mesh."""

from __future__ import annotations

from jmp_train.cli.options import parse
from jmp_train.cli.positional import take_experiment
from jmp_train.config.experiment import Experiment
from jmp_train.config.find import find_experiment
from jmp_train.runs.explain import explain_placement


def command(arguments: list[str]) -> None:
    """Print the placement of each parameter, and the bytes on each device."""
    name, options = take_experiment(arguments, "explain")
    default = find_experiment(name)
    parsed = parse(Experiment, default, options, f"jmp-train explain {name}")
    print(explain_placement(parsed))
