"""A run for Weights & Biases or for Trackio, which have one interface; ``pip install 'cilnorm[wandb]'``, ``[trackio]``.

Both keep their data where they always do, and listen to their own environment variables, ``WANDB_DIR`` and
``TRACKIO_DIR`` say. W&B is offline unless ``WANDB_MODE`` says otherwise, and ``wandb sync`` uploads later. Numbers
stand over the steps taken, accuracies over the tasks learned as well. A run that is resumed goes on in the same run.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from cilnorm.hookspecs import Logger, hookimpl
from cilnorm_loggers._events import identifier, metrics, note, numbers, settings

PROJECT = "cilnorm"


class RunLogger:
    """Tells one of the two, which is imported with the first event; notes the run's name in ``NAME.json``.

    Args:
        folder: of the run.
        package: ``wandb`` or ``trackio``.
    """

    def __init__(self, folder: Path, *, package: str) -> None:
        self._folder, self._package = folder, package
        self._run: Any = None
        self._steps, self._finished = 0, False

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Tells what an event holds."""
        if event["event"] == "run":
            self._steps = event["steps"]
            with contextlib.redirect_stdout(io.StringIO()):  # Trackio greets
                self._run = self._begin()
            return
        self._steps += event["steps"] if event["event"] == "epoch" else 0
        told: dict[str, Any] = dict(numbers(event))
        if event["event"] == "finished":
            self._finished = True
            told = {f"metric/{name}": value for name, value in metrics(event).items()}
        if told:
            told |= {name: event[name] for name in ("task", "epoch") if name in event}
            self._run.log(told, step=self._steps)

    def close(self) -> None:
        """Ends the run, as failed unless it is finished."""
        if self._run is not None:
            with contextlib.redirect_stdout(io.StringIO()):
                self._run.finish(**({"exit_code": int(not self._finished)} if self._package == "wandb" else {}))

    def _begin(self) -> Any:
        library = import_module(self._package)
        path = self._folder / f"{self._package}.json"
        number = identifier(path)
        name = f"{self._folder.name}-{number}"
        project = os.environ.get(f"{self._package.upper()}_PROJECT", PROJECT)
        asked: dict[str, Any] = {"project": project, "name": name, "resume": "allow", "config": settings(self._folder)}
        if self._package == "wandb":
            asked |= {"id": number, "mode": os.environ.get("WANDB_MODE", "offline"), "reinit": "create_new"}
            asked |= {"settings": library.Settings(console="off", silent=True)}
        else:
            asked |= {"embed": False}
        run = library.init(**asked)
        if self._package == "wandb":
            run.define_metric("accuracy/*", step_metric="task")
        note(path, id=number, name=name, project=project)
        return run


@hookimpl
def cilnorm_loggers() -> Sequence[Logger]:
    return [
        Logger(package, partial(RunLogger, package=package), needs=(package,), files=(f"{package}.json",))
        for package in ("wandb", "trackio")
    ]
