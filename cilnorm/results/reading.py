"""Runs as they lie on the disk, read for people: nothing here needs their data or their network."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cilnorm.files import read_text
from cilnorm.settings.spec_key import completed
from cilnorm.storage.accuracy_files import read_confusion
from cilnorm.storage.run_folder import MARK, FolderError, RunFolder
from cilnorm.values import SpecError, parsed

__all__ = ["NO_SETTING", "RunResult", "by_label", "differing", "flat", "read_result"]

NO_SETTING = ("preset", "residence")  # fields of a spec that change no number


@dataclass(frozen=True, eq=False)
class RunResult:
    """One run.

    Attributes:
        spec: its values, as spec.yaml has them, with fields that specs had not when it was written.
        matrix: accuracies in percent; row t holds those on tasks 0 .. t after learning task t.
        confusion: after each task, counts of (task, task given); empty for runs that did not keep them.
        epochs: the last telling of each epoch event, in order, each with ``speed`` in steps a second.
        summary, environment: as their files have them; empty where there are none.
    """

    folder: Path
    spec: dict[str, Any]
    matrix: list[list[float]]
    confusion: list[list[list[int]]]
    epochs: list[dict[str, Any]]
    summary: dict[str, Any]
    environment: dict[str, Any]

    @property
    def label(self) -> str:
        """What the run shares with those of other seeds."""
        return f"{self.spec['method']} x {self.spec['norm']}"

    @property
    def seed(self) -> int:
        """Of everything random."""
        return int(self.spec["seed"])

    @property
    def name(self) -> str:
        """For titles."""
        return f"{self.label}, seed {self.seed}"

    @property
    def speed(self) -> float | None:
        """Steps a second over all epochs, evaluation and the choice of exemplars left out."""
        timed = [(epoch["steps"], epoch["steps"] / epoch["speed"]) for epoch in self.epochs if epoch["speed"]]
        seconds = sum(took for _, took in timed)
        return sum(steps for steps, _ in timed) / seconds if seconds else None


def read_result(folder: Path) -> RunResult:
    """Reads a run, finished or not.

    Raises:
        FolderError: there is no run, or a file of it is damaged; the message names it.
    """
    RunFolder.require(folder)
    where = folder / MARK
    try:
        spec = parsed(read_text(where), str(where))
        where = folder / "accuracy.csv"
        matrix = _matrix(where)
        where = folder / "confusion.csv"
        confusion = read_confusion(folder)
        where = folder / "events.jsonl"
        epochs = _epochs(where)
        where = folder / "summary.json"
        summary = _json(where)
        where = folder / "environment.json"
        environment = _json(where)
    except FolderError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError, csv.Error) as error:
        raise FolderError(error if isinstance(error, SpecError) else f"{where}: can't be read: {error}") from error
    if not isinstance(spec, dict) or not {"method", "norm", "seed"} <= set(spec):
        raise FolderError(f"{folder / MARK}: is no spec of a run")
    return RunResult(folder, completed(spec), matrix, confusion, epochs, summary, environment)


def _matrix(path: Path) -> list[list[float]]:
    if not os.path.lexists(path):
        return []
    rows = list(csv.reader(io.StringIO(read_text(path))))[1:]
    return [[float(value) for value in row[1:] if value] for row in rows]


def _json(path: Path) -> dict[str, Any]:
    content = json.loads(read_text(path)) if os.path.lexists(path) else {}
    if not isinstance(content, dict):
        raise ValueError("expected names with values")
    return content


def _epochs(path: Path) -> list[dict[str, Any]]:
    """Epochs that a resumed run did again count once, where they were done last."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    before = 0.0
    for line in read_text(path).splitlines() if os.path.lexists(path) else ():
        try:
            event = json.loads(line)
        except ValueError:  # a line that a crash cut off
            continue
        if event["event"] == "epoch":
            key = (event["task"], event["phase"], event["epoch"])
            took = event["seconds"] - before
            found.pop(key, None)
            found[key] = {**event, "speed": event["steps"] / took if took > 0 else None}
        before = event["seconds"]
    return list(found.values())


def by_label(results: Iterable[RunResult]) -> dict[str, list[RunResult]]:
    """Runs that differ in nothing but their seed, under a label that says what they are and tells them apart."""
    groups: dict[str, list[RunResult]] = {}
    for result in results:
        same = json.dumps({**result.spec, "seed": None, "preset": None}, sort_keys=True)
        groups.setdefault(same, []).append(result)
    first = [members[0] for members in groups.values()]
    labels = [result.label for result in first]
    apart = differing([result.spec for result in first], ("method", "norm", "seed", *NO_SETTING))
    named = {}
    for result, members in zip(first, groups.values(), strict=True):
        label = result.label
        if labels.count(label) > 1:
            values = flat(result.spec)
            own = [f"{key.rpartition('.')[2]} {values[key]}" for key in apart if key in values]
            label += f" ({', '.join(own)})" if own else ""
        named[label] = members
    return named


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names as dotted ones."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def differing(mappings: Sequence[dict[str, Any]], but: Sequence[str] = ()) -> list[str]:
    """Dotted keys in which mappings differ."""
    every = [flat(mapping) for mapping in mappings]
    keys = list(dict.fromkeys(key for values in every for key in values))
    return [key for key in keys if key not in but and any(v.get(key) != every[0].get(key) for v in every)]
