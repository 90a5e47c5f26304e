"""The folder of a run: everything that is written, and where.

``spec.yaml`` repeats the run, ``environment.json`` says what it ran on, ``events.jsonl`` what happened,
``accuracy.csv`` is the accuracy matrix, ``confusion.csv`` says which tasks are taken for which, ``summary.json``
has the state and the metrics; ``checkpoints/`` and ``figures/`` hold those.
``cilnorm.storage.own_files`` lists the names.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from cilnorm.files import in_words, naming, open_plain, plain_folder, read_text, write_atomically
from cilnorm.images import ImageSet
from cilnorm.metrics import as_matrix, summarise
from cilnorm.registry import Registry
from cilnorm.spec import Spec, from_mapping, to_yaml
from cilnorm.storage.accuracy_files import ACCURACY, CONFUSION, accuracy_csv, confusion_csv, read_confusion
from cilnorm.storage.checkpoint import RunState
from cilnorm.storage.environment import describe, differences
from cilnorm.storage.own_files import FOLDERS, LOCK, LOG, MARK, FolderError, survey
from cilnorm.storage.resumed_files import ENVIRONMENT, kept_log, read_environment
from cilnorm.values import SpecError, mappings, parsed

__all__ = ["LOCK", "MARK", "FolderError", "RunFolder", "default_folder", "folder_of_seeds", "read_summary"]

SUMMARY = "summary.json"


class RunFolder:
    """Writes a run's files, each to a temporary name first, except the log, which grows line by line.

    From ``create`` or ``reopen`` on, all of it raises FolderError once the folder is not where it was.

    Attributes:
        sizes: classes of each task, once they are known.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sizes: tuple[int, ...] = ()
        self.checkpoints = path / "checkpoints"
        self._place: os.stat_result | None = None

    @staticmethod
    def holds_a_run(path: Path) -> bool:
        """Whether a run was begun there."""
        return (path / MARK).is_file()

    @staticmethod
    def require(path: Path) -> None:
        """Raises FolderError, which says what there is instead, where no run was begun."""
        try:
            if RunFolder.holds_a_run(path):
                return
            if not path.exists():
                raise FolderError(f"{path} holds no run: there is no such folder")
            if not path.is_dir():
                raise FolderError(f"{path} holds no run: it is a file, not the folder of one")
            inside = sorted({mark.parent for depth in ("*", "*/*") for mark in path.glob(f"{depth}/{MARK}")})
            empty = not any(path.iterdir())
        except FolderError:
            raise
        except OSError as error:
            raise FolderError(f"{path} holds no run that can be read: {error.strerror or error}") from error
        if inside:
            raise FolderError(f"{path} holds no run itself, but {len(inside)} inside: {inside[0]} is one")
        raise FolderError(f"{path} holds no run: {'it is empty' if empty else f'there is no {MARK}'}")

    def read_spec(self, registry: Registry) -> Spec:
        """The run's spec.

        Raises:
            FolderError: there is no run.
            SpecError: its spec can't be read.
        """
        self.require(self.path)
        mark = self.path / MARK
        try:
            values = parsed(read_text(mark), str(mark))
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError(f"{mark}: {getattr(error, 'strerror', None) or 'no text'}") from error
        return from_mapping(mappings({"": values}, str(mark))[""], registry, None, {})

    @classmethod
    def check(cls, path: Path, overwrite: bool = False, also: Sequence[str] = ()) -> None:
        """Raises FolderError if ``path`` holds a run that must not be replaced, or anything that no run writes.

        Args:
            also: patterns of names that loggers write.
        """
        try:
            found = survey(path, also)
        except OSError as error:
            raise _unusable(path, error) from error
        if found.others or (found.begun and not cls.holds_a_run(path)):
            names = found.in_the_way() or ", ".join(found.own)
            raise FolderError(f"{path} holds other files, which stay as they are: {names}; give --out a new folder")
        if found.begun and not overwrite:
            raise FolderError(cls.taken(path, "a run already; resume it,", also))

    @staticmethod
    def taken(path: Path, what: str, also: Sequence[str] = ()) -> str:
        """That ``path`` holds ``what``, and the way out; --overwrite is one only where nothing else lies there."""
        ways = "give another --out" if survey(path, also).others else "give --overwrite or another --out"
        return f"{path} holds {what}{' or' if what.endswith(',') else ';'} {ways}"

    @classmethod
    def create(cls, path: Path, spec: Spec, overwrite: bool = False, also: Sequence[str] = ()) -> RunFolder:
        """A new folder with the spec in it; of an old run's, only what runs write is removed.

        Raises:
            FolderError: it holds a run already, or other files, or can't be written.
        """
        cls.check(path, overwrite, also)
        folder = cls(path)
        try:
            found = survey(path, also)
            old = {*found.parts, *(found.own if found.begun else ())} - {LOCK}
            for name in sorted(old, key=MARK.__eq__):  # the mark last, so that a folder half emptied is still ours
                (path / name).unlink(missing_ok=True)
            for name in found.folders if found.begun else ():
                with suppress(OSError):  # only what is empty goes
                    (path / name).rmdir()
            path.mkdir(parents=True, exist_ok=True)
            folder._take_place()
            write_atomically(path / MARK, to_yaml(spec))
        except OSError as error:
            raise _unusable(path, error) from error
        return folder

    def reopen(self, logged: int, rows: Sequence[Sequence[float]]) -> None:
        """Takes back what a stopped process wrote after its last checkpoint, and what it left half written.

        Args:
            logged: bytes of the log to keep.
            rows: of the accuracy matrix.

        Raises:
            FolderError: the run is finished and its checkpoints are gone, what will be added to can't be read, or the
                folder can't be written; nothing is changed then.
        """
        if not rows and read_summary(self.path).get("state") == "finished":
            again = f"`cilnorm run --spec {self.path / MARK}` trains it again in a folder of its own"
            raise FolderError(f"{self.path} is finished, and its checkpoints are gone; its results stay; {again}")
        try:
            log = kept_log(self.path, logged)
            read_confusion(self.path)
            read_environment(self.path)
            for name in survey(self.path).parts:
                (self.path / name).unlink(missing_ok=True)
            self._take_place()
            if log is not None:
                write_atomically(self.path / LOG, log)  # anew, so that a copy made of hard links keeps its own
            if rows:
                self.write_accuracy(rows)
            else:
                (self.path / ACCURACY).unlink(missing_ok=True)
        except FolderError:
            raise
        except OSError as error:
            raise _unusable(self.path, error) from error

    def _take_place(self) -> None:
        plain_folder(self.path / "trials")
        for name in FOLDERS:
            if not plain_folder(self.path / name):
                (self.path / name).mkdir()
        self._place = os.stat(self.path)

    def check_place(self) -> None:
        """Raises FolderError if the folder was moved, removed or replaced since ``create`` or ``reopen``."""
        try:
            if self._place is None or os.path.samestat(self._place, os.stat(self.path)):
                return
        except (FileNotFoundError, NotADirectoryError):
            pass
        raise FolderError(f"{self.path} was moved or removed while the run was at work; nothing more is written")

    def log(self, event: Mapping[str, Any]) -> None:
        """Appends one line to events.jsonl."""
        self.check_place()
        line = json.dumps({"time": round(time.time(), 3), **event}) + "\n"
        path = self.path / LOG
        with naming(path), os.fdopen(open_plain(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as file:
            file.write(line.encode())

    def logged(self) -> int:
        """Bytes of the log, all of them on the disk now."""
        self.check_place()
        handle = open_plain(self.path / LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.fsync(handle)
            return os.fstat(handle).st_size
        finally:
            os.close(handle)

    def write_environment(
        self,
        registry: Registry,
        device: torch.device,
        images: ImageSet,
        order: Sequence[int],
        size: Sequence[int],
        processes: int = 1,
    ) -> list[str]:
        """Records what could make the same spec give other numbers elsewhere, and what the numbers are about.

        Of a run that goes on, environment.json keeps what it began with; another environment is added under ``later``.

        Args:
            order: the source's labels in the order of learning.
            size: channels, height and width of what the network is given.
            processes: that share the run.

        Returns:
            What differs from the environment before, a line each.
        """
        about = {
            "classes": [images.class_names[label] for label in order],
            "mean": images.mean,
            "std": images.std,
            "size": list(size),
        }
        now = {**describe(registry, device), "processes": processes, "dataset_sha256": images.digest}
        first, apart = read_environment(self.path), []
        if first:
            earlier = first.get("later", [])
            before = {"processes": 1, **(earlier[-1] if earlier else first)}  # runs of 0.1.0 were all of one
            apart = differences(before, now)
            if not apart:
                return []
            first["later"] = [*earlier, {"time": round(time.time(), 3), **now}]
        self._write(ENVIRONMENT, json.dumps(first or {**now, "images": about}, indent=2) + "\n")
        return apart

    def _write(self, name: str, text: str) -> None:
        self.check_place()
        write_atomically(self.path / name, text)

    def write_spec(self, spec: Spec) -> None:
        """spec.yaml anew, once its open options are chosen."""
        self._write(MARK, to_yaml(spec))

    def write_tuning(self, trials: Sequence[Any]) -> None:
        """tuning.json: what was tried for options chosen on held-out images (dataclasses), in order."""
        rows = [dataclasses.asdict(trial) for trial in trials]
        self._write("tuning.json", json.dumps(rows, indent=2) + "\n")

    def write_accuracy(self, rows: Sequence[Sequence[float]]) -> None:
        """The accuracies in percent so far; row t holds those on tasks 0 .. t after learning task t."""
        self._write(ACCURACY, accuracy_csv(rows))

    def write_confusion(self, counts: Sequence[Sequence[int]]) -> None:
        """Adds the counts after the newest task; what an earlier, stopped process wrote of it or later is replaced."""
        self._write(CONFUSION, confusion_csv(read_confusion(self.path)[: len(counts) - 1], counts))

    def write_summary(self, name: str, state: RunState, **facts: Any) -> dict[str, Any]:
        """summary.json: what the run does, its metrics in percent once a task is learned, and further facts.

        Metrics of the head, where another classifier fills the matrix, and of other views of the network go under
        ``by_head`` and ``by_view``; A_f, A_a and A_l of what else was measured under its name.

        Args:
            name: ``running``, ``finished``, ``interrupted`` or ``failed``.
        """
        rows, others = state.matrix, state.others
        summary = {"state": name, **(summarise(as_matrix(rows), self.sizes) if rows else {}), **facts}
        if state.by_head:
            summary["by_head"] = summarise(as_matrix(state.by_head), self.sizes)
        if state.by_view:
            summary["by_view"] = {view: summarise(as_matrix(own), self.sizes) for view, own in state.by_view.items()}
        if rows and len(others) == len(rows):  # a run that an earlier version began lacks some
            for kind in ("task_aware", "top5"):
                found = summarise(as_matrix([each[kind] for each in others]), self.sizes)
                summary[kind] = {metric: found[metric] for metric in ("A_f", "A_a", "A_l")}
            summary |= {kind: value for kind, value in others[-1].items() if kind.startswith("ece_")}
        if len(set(self.sizes)) > 1:
            summary["sizes"] = list(self.sizes)
        self._write(SUMMARY, json.dumps(summary, indent=2) + "\n")
        return summary


def read_summary(folder: Path) -> dict[str, Any]:
    """What ``write_summary`` wrote last in a run's folder; empty where there is none that can be read."""
    try:
        content = json.loads(read_text(folder / SUMMARY))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


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


def _unusable(path: Path, error: OSError) -> FolderError:
    inner = isinstance(error.filename, str) and path in Path(error.filename).parents
    return FolderError(f"can't write the run folder {path}: {in_words(error) if inner else error.strerror or error}")
