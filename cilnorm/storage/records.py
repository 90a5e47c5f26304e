"""The files that a resumed run adds to, read, and checked before anything is added.

Each function raises FolderError where it can't, with the file, the line and the way out.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from cilnorm.files import read_plain, read_text
from cilnorm.storage.own_files import LOG, FolderError

__all__ = ["CONFUSION", "ENVIRONMENT", "kept_log", "read_confusion", "read_environment"]

CONFUSION, ENVIRONMENT = "confusion.csv", "environment.json"
T = TypeVar("T")


def read_confusion(folder: Path) -> list[list[list[int]]]:
    """confusion.csv: counts of (task, task given), one square matrix a learned task.

    Empty where there is no such file, and for tasks that it does not tell of.
    """
    return _checked(folder / CONFUSION, _counts, [], "the counts of the tasks so far")


def read_environment(folder: Path) -> dict[str, Any]:
    """environment.json; empty where there is none."""
    return _checked(folder / ENVIRONMENT, _environment, {}, "what the run ran on so far")


def kept_log(folder: Path, logged: int) -> bytes | None:
    """The whole lines among the first ``logged`` bytes of the log.

    None if that is all there is, in a file that has no other name: a copy made of hard links shares it with its origin.
    """

    def lines(path: Path) -> bytes | None:
        raw = read_plain(path)
        kept = raw[: raw[:logged].rfind(b"\n") + 1]
        for number, line in enumerate(kept.split(b"\n")[:-1], 1):
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                event = None
            if not isinstance(event, dict):
                raise ValueError(f"line {number} is no event")
        return None if kept == raw and os.stat(path).st_nlink == 1 else kept

    return _checked(folder / LOG, lines, None, "the events so far")


def _checked(path: Path, read: Callable[[Path], T], missing: T, holds: str) -> T:
    if not os.path.lexists(path):
        return missing
    try:
        return read(path)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        way_out = f"put a sound copy back, or move it away and go on without {holds}"
        raise FolderError(f"{path}: can't be read: {reason}; {way_out}") from error


def _counts(path: Path) -> list[list[list[int]]]:
    try:
        lines = list(csv.reader(io.StringIO(read_text(path))))
    except csv.Error as error:
        raise ValueError(str(error)) from error
    if not lines or lines[0][:2] != ["after_task", "task"]:
        raise ValueError("line 1 is no header")
    found: dict[int, list[list[int]]] = {}
    for number, line in enumerate(lines[1:], 2):
        try:
            after, task, *counts = [int(cell) for cell in line if cell]
        except ValueError:
            raise ValueError(f"line {number} is no row of counts") from None
        rows = found.setdefault(after, [])
        rows.append(counts)
        if (task, len(counts)) != (len(rows), after):
            raise ValueError(f"line {number} has {len(counts)} counts of task {task} after task {after}")
    for after, rows in found.items():
        if len(rows) != after:
            raise ValueError(f"rows after task {after} are missing")
    return [found.get(after, []) for after in range(1, max(found, default=0) + 1)]


def _environment(path: Path) -> dict[str, Any]:
    content = json.loads(read_text(path))
    if not isinstance(content, dict):
        raise ValueError("expected names with values")
    later = content.get("later", [])
    if not isinstance(later, list) or not all(isinstance(each, dict) for each in later):
        raise ValueError("later: expected a list of environments")
    return content
