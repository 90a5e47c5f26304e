"""Every number of a run as a line of ``log.csv``: seconds, task, phase, epoch, name, value.

Names are ``loss/TERM``, ``lr``, ``accuracy/task U`` and ``accuracy/mean``. The file grows line by line; after a resumed
run the later of two lines on one thing is the one that counts.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cilnorm.files import open_plain
from cilnorm.hookspecs import Logger, hookimpl

COLUMNS = ("seconds", "task", "phase", "epoch", "name", "value")


class CsvLogger:
    """Appends to ``log.csv`` in the run's folder."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "log.csv"

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Writes the numbers of an event at once, so that nothing is lost with the process."""
        lines = [
            (event["seconds"], event["task"], event.get("phase", ""), event.get("epoch", ""), name, value)
            for name, value in numbers(event)
        ]
        if lines:
            handle = open_plain(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            with os.fdopen(handle, "a", encoding="utf-8", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerows(lines if os.fstat(handle).st_size else [COLUMNS, *lines])


def numbers(event: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Name and value of every number that an event tells."""
    if event["event"] == "epoch":
        yield from ((f"loss/{name}", value) for name, value in event["terms"].items())
        yield "lr", event["lr"]
    elif event["event"] == "accuracy":
        yield from ((f"accuracy/task {task}", value) for task, value in enumerate(event["accuracy"], 1))
        yield "accuracy/mean", sum(event["accuracy"]) / len(event["accuracy"])


@hookimpl
def cilnorm_loggers() -> Sequence[Logger]:
    return [Logger("csv", CsvLogger, files=("log.csv",))]
