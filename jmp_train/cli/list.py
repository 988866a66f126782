"""`jmp-train list`: list the experiments."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from jmp_train.config.find import experiment_files, find_experiment
from jmp_train.data.data import own_of
from jmp_train.errors import UsageError


def command(arguments: list[str]) -> None:
    """Print a table of the experiments, then a line for each file that cannot be run."""
    if arguments:
        raise UsageError(f"unexpected {arguments[0]!r}; jmp-train list takes no argument")
    table = Table("experiment", "policy", "data", "metric", box=None, header_style="bold")
    broken = {}
    for name in experiment_files():
        try:
            experiment = find_experiment(name)
        except UsageError as error:
            broken[name] = error
            continue
        table.add_row(name, experiment.policy, own_of(experiment.data).name, experiment.metric)
    console = Console()
    console.print(table)
    for name, error in broken.items():
        console.print(
            f"{name}: {error}", style="red", markup=False, highlight=False, soft_wrap=True
        )
