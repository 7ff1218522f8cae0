"""Sends what a run logs to MLflow, as `engine.follower` says.

Called as `python -m seed_exp.engine.mlflow_process FOLDER`. The place is MLflow's own choice:
MLFLOW_TRACKING_URI, or its default. A run is found by a tag with its id, and another tag has the
last step that was sent, so that nothing has to be kept here.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seed_exp.base.stopping import REQUEUE_STATUS
from seed_exp.config.options import flatten
from seed_exp.engine.follower import StudentRun, Trainer, reason_of, run_folder, send_all

ID, STEP = "seed_exp.id", "seed_exp.step"
"""Tags of a run: its id in mlflow.json, and the last step that was sent."""
_MAX_PARAMS = 100
"""Parameters in one request, by MLflow's rule."""


class MlflowRun(StudentRun):
    """A student's run in MLflow, in the experiment `tracker.project`."""

    def __init__(
        self, student: str, about: Mapping[str, Any], folder: Path, training: Trainer
    ) -> None:
        super().__init__(student, about, folder, training)
        self._is_open = self._media_failed = False
        self._sent: set[tuple[str, int]] = set()

    def begin(self) -> int:
        """Finds the run, or makes it; returns the last step that MLflow has."""
        from mlflow import MlflowClient

        self._client: Any = MlflowClient()
        name = self.about["project"]
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        found = self._client.search_runs([number], f"tags.`{ID}` = '{self.id}'", max_results=1)
        run = found[0] if found else self._create(number)
        self._run_id = run.info.run_id
        self._log_options(run.data.params)
        step = int(run.data.tags.get(STEP, -1))
        # A request that was cut off may have left some numbers of a later step.
        self._sent = {
            (key, entry.step)
            for key in run.data.metrics
            for entry in self._client.get_metric_history(self._run_id, key)
            if entry.step > step
        }
        return step

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Sends the numbers of a step in one request, then its pictures and tables."""
        from mlflow.entities import Metric, RunTag

        if not self._is_open:
            self._client.update_run(self._run_id, status="RUNNING")
            self._is_open = True
        now = int(time.time() * 1000)
        numbers = [
            Metric(key, value, now, step)
            for key, value in row.items()
            if not isinstance(value, dict) and (key, step) not in self._sent
        ]
        for key, value in row.items():
            if isinstance(value, dict):
                self._send_media(key, value)
        self._client.log_batch(self._run_id, numbers, tags=[RunTag(STEP, str(step))])

    def write_weights(self, path: Path) -> None:
        """Sends the student's file as an artifact."""
        self._client.log_artifact(self._run_id, str(path), "model")

    def end(self, status: int) -> None:
        """Says how the training ended, if anything was sent."""
        if not self._is_open:
            return
        if status == REQUEUE_STATUS:
            self._client.update_run(self._run_id, status="SCHEDULED")
        else:
            self._client.set_terminated(self._run_id, "FAILED" if status else "FINISHED")

    def _create(self, experiment: str) -> Any:
        about = self.about
        tags = {
            ID: self.id,
            "seed_exp.student": self.student,
            "seed_exp.command": about["job_type"],
            "seed_exp.group": about["group"],
            "seed_exp.tags": ", ".join(about["tags"]),
        }
        name = about["names"][self.student]
        return self._client.create_run(experiment, tags=tags, run_name=name)

    def _log_options(self, known: Mapping[str, str]) -> None:
        """Sends the options that the run lacks; MLflow does not let them change."""
        from mlflow.entities import Param

        options = {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in flatten(self.about["config"]).items()
        }
        params = [Param(key, value) for key, value in options.items() if key not in known]
        for start in range(0, len(params), _MAX_PARAMS):
            self._client.log_batch(self._run_id, params=params[start : start + _MAX_PARAMS])

    def _send_media(self, key: str, entry: Mapping[str, Any]) -> None:
        """Sends a picture or a table; one that fails is not worth the numbers."""
        try:
            if "picture" in entry:
                folder = str(Path("media", key).parent)
                self._client.log_artifact(self._run_id, str(self.picture(entry)), folder)
            else:
                table = {"columns": entry["columns"], "data": entry["rows"]}
                self._client.log_dict(self._run_id, table, f"media/{key}.json")
        except Exception as error:  # the place of artifacts is another one than that of numbers
            if not self._media_failed:
                self.training.show_line(
                    logging.WARNING,
                    f"pictures are not sent ({reason_of(error)}); the run folder has them",
                )
            self._media_failed = True


def main() -> None:
    """Follows the run folder until its training has ended."""
    # We try again ourselves; until then a server that is away should cost seconds.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    send_all(run_folder(), "mlflow", MlflowRun)


if __name__ == "__main__":
    main()
