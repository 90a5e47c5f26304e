"""A run for MLflow, ``pip install 'cilnorm[mlflow]'``.

It is kept where MLflow keeps things: ``mlflow.db`` in the working folder, or wherever ``MLFLOW_TRACKING_URI`` says, in
the experiment ``cilnorm`` or ``MLFLOW_EXPERIMENT_NAME``. Numbers stand over the steps taken, accuracies over the tasks
learned. A run that is resumed goes on in the same run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cilnorm.hookspecs import Logger, hookimpl
from cilnorm_loggers._events import identifier, metrics, note, numbers, settings

EXPERIMENT = "cilnorm"
LONGEST = 6000  # characters of a value that MLflow takes


class MLflowLogger:
    """Tells MLflow, which is imported with the first event; notes the run's number in ``mlflow.json``.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._client: Any = None
        self._number, self._state = "", "KILLED"
        self._steps = 0

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Tells what an event holds."""
        kind = event["event"]
        if kind == "run":
            self._steps = event["steps"]
            self._begin()
        elif kind == "epoch":
            self._steps += event["steps"]
            self._tell(dict(numbers(event)), self._steps)
        elif kind == "accuracy":
            self._tell(dict(numbers(event)), event["task"])
        elif kind == "finished":
            self._state = "FINISHED"
            self._tell(metrics(event), self._steps)
        elif kind == "stopped":
            self._state = "FAILED"
            self._client.set_tag(self._number, "stopped", f"{event['where']}: {event['reason']}"[:LONGEST])

    def close(self) -> None:
        """Ends the run."""
        if self._client is not None and self._number:
            self._client.set_terminated(self._number, self._state)

    def _begin(self) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        client, path = MlflowClient(), self._folder / "mlflow.json"
        number = identifier(path)
        try:
            client.update_run(number, status="RUNNING")
        except MlflowException:  # there is none of that number
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
            found = client.get_experiment_by_name(name)
            home = found.experiment_id if found else client.create_experiment(name)
            number = client.create_run(home, run_name=self._folder.name).info.run_id
            told = [Param(key, str(value)[:LONGEST]) for key, value in settings(self._folder).items()]
            client.log_batch(number, params=told)
            note(path, id=number, experiment=name)
        self._client, self._number = client, number

    def _tell(self, told: Mapping[str, float], step: int) -> None:
        import time

        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(self._number, [Metric(name, value, now, step) for name, value in told.items()])


@hookimpl
def cilnorm_loggers() -> Sequence[Logger]:
    return [Logger("mlflow", MLflowLogger, needs=("mlflow",), files=("mlflow.json",))]
