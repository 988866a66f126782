"""`jmp-train eval RUN_DIR`: evaluate the newest checkpoint of a run."""

from __future__ import annotations

from jmp_train.cli.compilation_cache import keep_compiled
from jmp_train.cli.options import parse
from jmp_train.cli.positional import choose_run, take_run
from jmp_train.config.experiment import Experiment
from jmp_train.reports.progress import display_name
from jmp_train.reports.stages import terminal_alone
from jmp_train.results.load import stored_experiment
from jmp_train.runs.evaluate import evaluate_run


def command(arguments: list[str]) -> None:
    """Evaluate the newest checkpoint of a run, and print its metrics."""
    given, options = take_run(arguments, "eval")
    run_dir = choose_run(given)
    stored = stored_experiment(run_dir)
    experiment = parse(Experiment, stored, options, f"jmp-train eval {run_dir}")
    keep_compiled()
    result = evaluate_run(run_dir, experiment, terminal_alone())
    step = result.pop("step")
    metrics = "  ".join(f"{display_name(k)} {v:.4f}" for k, v in result.items())
    print(f"step {step}  {metrics}  {run_dir}")
