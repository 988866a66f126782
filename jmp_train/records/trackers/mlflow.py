"""MLflow: one run for a run's directory, resumed with it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import jax

from jmp_train.records.trackers.tracker import numbers
from jmp_train.types import Json

_ID = "jmp_train.run_id"  # a tag, by which the run is found again
_PARAMS_A_CALL = 100  # MLflow's own limit


class Mlflow:
    """Passes records to MLflow, as `Tracker`.

    The environment variables of its client apply, such as MLFLOW_TRACKING_URI and
    MLFLOW_EXPERIMENT_NAME (the experiment's name by default). Settings are parameters of the run, as
    they were when it was created: MLflow lets none change.
    """

    def start(self, config: Json) -> None:
        """Create the run, or resume the one that has the id of the directory's run."""
        from mlflow import MlflowClient

        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or config["experiment"]
        experiment = self._client.get_experiment_by_name(name)
        where = experiment.experiment_id if experiment else self._client.create_experiment(name)
        found = self._client.search_runs([where], f"tags.`{_ID}` = '{config['run']['id']}'")
        if found:
            self._run_id = found[0].info.run_id
            self._client.update_run(self._run_id, status="RUNNING")
        else:
            self._run_id = self._create(where, config)

    def _create(self, where: str, config: Json) -> str:
        from mlflow.entities import Param

        run = config["run"]
        created = self._client.create_run(
            where, tags={_ID: run["id"]}, run_name=Path(run["directory"]).name
        )
        settings = {name: value for name, value in config.items() if name != "run"}
        leaves = jax.tree_util.tree_leaves_with_path(
            settings, is_leaf=lambda x: not isinstance(x, dict)
        )
        name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
        params = [Param(name(path), str(value)) for path, value in leaves]
        for i in range(0, len(params), _PARAMS_A_CALL):
            self._client.log_batch(created.info.run_id, params=params[i : i + _PARAMS_A_CALL])
        return created.info.run_id

    def record(self, step: int, split: str, values: Json) -> None:
        """Log the numbers of a record."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(k, v, now, step) for k, v in numbers(split, values).items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def finish(self, summary: Json) -> None:
        """Mark the run as finished or failed."""
        self._client.set_terminated(self._run_id, "FINISHED" if summary else "FAILED")
