"""Every number of a run as a line of ``log.csv``: seconds, task, phase, epoch, name, value.

Names are ``loss/TERM``, ``lr``, ``accuracy/task U`` and ``accuracy/mean``. The file grows line by line; after a resumed
run the later of two lines on one thing is the one that counts.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cilnorm.files import open_plain
from cilnorm.hookspecs import Logger, hookimpl
from cilnorm_loggers._events import numbers

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


@hookimpl
def cilnorm_loggers() -> Sequence[Logger]:
    return [Logger("csv", CsvLogger, files=("log.csv",))]
