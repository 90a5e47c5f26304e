"""accuracy.csv and confusion.csv: how they are written, and how they are read again."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from cilnorm.files import read_text
from cilnorm.storage.resumed_files import read_checked

__all__ = ["ACCURACY", "CONFUSION", "accuracy_csv", "confusion_csv", "read_confusion"]

ACCURACY, CONFUSION = "accuracy.csv", "confusion.csv"


def accuracy_csv(rows: Sequence[Sequence[float]]) -> str:
    """accuracy.csv: row t, column u is the accuracy in percent on task u after learning task t, from 1."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["after_task", *(f"task_{u + 1}" for u in range(len(rows)))])
    for t, row in enumerate(rows):
        writer.writerow([t + 1, *(repr(value) for value in row), *[""] * (len(rows) - len(row))])
    return text.getvalue()


def confusion_csv(before: Sequence[Sequence[Sequence[int]]], counts: Sequence[Sequence[int]]) -> str:
    """confusion.csv: after task t, how many test images of each task got a class of each task.

    Args:
        before: the counts after earlier tasks.
        counts: those after the newest task, one row a task.
    """
    text, after = io.StringIO(), len(counts)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["after_task", "task", *(f"as_task_{u + 1}" for u in range(after))])
    for t, rows in [*enumerate(before, 1), (after, counts)]:
        for u, row in enumerate(rows, 1):
            writer.writerow([t, u, *row, *[""] * (after - len(row))])
    return text.getvalue()


def read_confusion(folder: Path) -> list[list[list[int]]]:
    """confusion.csv: counts of (task, task given), one square matrix a learned task.

    Empty where there is no such file, and for tasks that it does not tell of.
    """
    return read_checked(folder / CONFUSION, _counts, [], "the counts of the tasks so far")


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
