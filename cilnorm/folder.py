"""The folder of a run: everything that is written, and where.

``spec.yaml`` repeats the run, ``environment.json`` says what it ran on, ``events.jsonl`` what happened,
``accuracy.csv`` is the accuracy matrix, ``confusion.csv`` says which tasks are taken for which, ``summary.json``
has the state and the metrics; ``checkpoints/`` and ``figures/`` hold those.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cilnorm.environment import describe
from cilnorm.files import PART, remove_parts, write_atomically
from cilnorm.images import ImageSet
from cilnorm.metrics import as_matrix, summarise
from cilnorm.registry import Registry
from cilnorm.spec import Spec, to_yaml

__all__ = ["MARK", "FolderError", "RunFolder", "default_folder", "folder_of_seeds", "read_confusion"]

MARK, LOCK, LOG = "spec.yaml", "lock", "events.jsonl"
OURS = {LOCK, "checkpoints", "figures"}


class FolderError(OSError):
    """The folder of a run can't be used; the message is for the user."""


class RunFolder:
    """Writes a run's files, each to a temporary name first, except the log, which grows line by line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"

    @staticmethod
    def holds_a_run(path: Path) -> bool:
        """Whether a run was begun there."""
        return (path / MARK).is_file()

    @classmethod
    def check(cls, path: Path, overwrite: bool = False) -> None:
        """Raises FolderError if ``path`` holds a run that must not be replaced, or other files."""
        try:
            found = [file for file in path.iterdir() if not _begun(file)] if path.exists() else []
            if found and not cls.holds_a_run(path):
                raise FolderError(f"{path} holds other files; give --out a new folder")
            if found and not overwrite:
                raise FolderError(f"{path} holds a run already; resume it, or give --overwrite or another --out")
        except FolderError:
            raise
        except OSError as error:
            raise FolderError(f"can't write the run folder {path}: {error.strerror or error}") from error

    @classmethod
    def create(cls, path: Path, spec: Spec, overwrite: bool = False) -> RunFolder:
        """A new folder with the spec in it.

        Raises:
            FolderError: it holds a run already, or other files, or can't be written.
        """
        cls.check(path, overwrite)
        folder = cls(path)
        try:
            found = sorted(path.iterdir(), key=lambda old: old.name == MARK) if path.exists() else ()
            for old in found:  # the mark last, so that a folder half emptied is still known as ours
                if old.name != LOCK:
                    shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
            folder.checkpoints.mkdir(parents=True, exist_ok=True)
            (path / "figures").mkdir(exist_ok=True)
            write_atomically(path / MARK, to_yaml(spec))
        except OSError as error:
            raise FolderError(f"can't write the run folder {path}: {error.strerror or error}") from error
        return folder

    def reopen(self, logged: int, rows: Sequence[Sequence[float]]) -> None:
        """Takes back what a stopped process wrote after its last checkpoint, and what it left half written.

        Args:
            logged: bytes of the log to keep.
            rows: of the accuracy matrix.
        """
        remove_parts(self.path)
        self.checkpoints.mkdir(exist_ok=True)
        (self.path / "figures").mkdir(exist_ok=True)
        if (self.path / LOG).exists():
            with open(self.path / LOG, "r+b") as file:
                file.truncate(file.read()[:logged].rfind(b"\n") + 1)
        if rows:
            self.write_accuracy(rows)
        else:
            (self.path / "accuracy.csv").unlink(missing_ok=True)

    def log(self, event: Mapping[str, Any]) -> None:
        """Appends one line to events.jsonl."""
        with open(self.path / LOG, "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **event}) + "\n")

    def logged(self) -> int:
        """Bytes of the log, all of them on the disk now."""
        with open(self.path / LOG, "ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    def write_environment(
        self, registry: Registry, device: torch.device, images: ImageSet, order: Sequence[int]
    ) -> None:
        """Records what could make the same spec give other numbers elsewhere, and what the numbers are about.

        Args:
            order: the source's labels in the order of learning.
        """
        about = {
            "classes": [images.class_names[label] for label in order],
            "mean": images.mean,
            "std": images.std,
            "size": list(images.train_images.shape[1:]),
        }
        environment = {**describe(registry, device), "dataset_sha256": images.digest, "images": about}
        write_atomically(self.path / "environment.json", json.dumps(environment, indent=2) + "\n")

    def write_spec(self, spec: Spec) -> None:
        """spec.yaml anew, once its open options are chosen."""
        write_atomically(self.path / MARK, to_yaml(spec))

    def write_tuning(self, trials: Sequence[Any]) -> None:
        """tuning.json: what was tried for options chosen on held-out images (dataclasses), in order."""
        rows = [dataclasses.asdict(trial) for trial in trials]
        write_atomically(self.path / "tuning.json", json.dumps(rows, indent=2) + "\n")

    def write_accuracy(self, rows: Sequence[Sequence[float]]) -> None:
        """accuracy.csv: row t, column u is the accuracy in percent on task u after learning task t, from 1."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["after_task", *(f"task_{u + 1}" for u in range(len(rows)))])
        for t, row in enumerate(rows):
            writer.writerow([t + 1, *(repr(value) for value in row), *[""] * (len(rows) - len(row))])
        write_atomically(self.path / "accuracy.csv", text.getvalue())

    def write_confusion(self, counts: Sequence[Sequence[int]]) -> None:
        """Adds to confusion.csv, after learning task t, how many test images of each task got a class of each task.

        What an earlier, stopped process wrote of this task or later ones is replaced.
        """
        text, after = io.StringIO(), len(counts)
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["after_task", "task", *(f"as_task_{u + 1}" for u in range(after))])
        for t, rows in enumerate([*read_confusion(self.path)[: after - 1], counts], 1):
            for u, row in enumerate(rows, 1):
                writer.writerow([t, u, *row, *[""] * (after - len(row))])
        write_atomically(self.path / "confusion.csv", text.getvalue())

    def write_summary(
        self, state: str, rows: Sequence[Sequence[float]], by_head: Sequence[Sequence[float]] = (), **facts: Any
    ) -> dict[str, Any]:
        """summary.json: the run's state, its metrics in percent once a task is learned, and further facts.

        Args:
            by_head: the head's rows where another classifier's fill the matrix; their metrics go under its name.
        """
        summary = {"state": state, **(summarise(as_matrix(rows)) if rows else {}), **facts}
        if by_head:
            summary["by_head"] = summarise(as_matrix(by_head))
        write_atomically(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")
        return summary


def read_confusion(folder: Path) -> list[list[list[int]]]:
    """confusion.csv: one square matrix a learned task, empty where there is no such file."""
    found: list[list[list[int]]] = []
    if (folder / "confusion.csv").is_file():
        with open(folder / "confusion.csv", encoding="utf-8", newline="") as file:
            for after, _, *counts in list(csv.reader(file))[1:]:
                if int(after) > len(found):
                    found.append([])
                found[-1].append([int(count) for count in counts if count])
    return found


def default_folder(spec: Spec) -> Path:
    """A new folder under ``runs/``, named after the time and what is run."""
    preset = re.sub(r"[^\w.-]", "_", spec.preset)[:40]  # a spec.yaml of somebody else may hold anything
    stem = time.strftime("%Y%m%d-%H%M%S") + f"-{preset or 'run'}-{spec.method}-{spec.norm}-s{spec.seed}"
    path = Path("runs") / stem
    return path if not path.exists() else path.with_name(f"{stem}-{time.time_ns() % 10**6}")


def folder_of_seeds(spec: Spec) -> Path:
    """The folder under ``runs/`` of a spec with several seeds: always the same one, whatever the seeds are."""
    preset = re.sub(r"[^\w.-]", "_", spec.preset)[:40]
    return Path("runs") / f"{preset or 'run'}-{spec.method}-{spec.norm}-seeds-{dataclasses.replace(spec, seed=0).key}"


def _begun(path: Path) -> bool:
    """Whether this is all that a run leaves that was killed before it had its spec: our folders, empty, and parts."""
    return path.name.endswith(PART) or (path.name in OURS and not (path.is_dir() and any(path.iterdir())))
