"""Runs that are asked for: where each lies, how far it is, and the command that begins or continues it.

Beside the run's folder FOLDER lie ``FOLDER.yaml``, the spec as it was asked for, ``FOLDER.log``, what its processes
printed, and ``FOLDER.failed``, why the last one failed. The state is read from these files alone, so it does not matter
who was killed when.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cilnorm.files import open_plain, write_atomically
from cilnorm.registry import Registry
from cilnorm.spec import Spec, read_spec, to_yaml
from cilnorm.storage.interruptions import STOPPING
from cilnorm.storage.lock import BUSY, busy
from cilnorm.storage.run_folder import MARK, FolderError, read_summary
from cilnorm.sweep.expected_work import ExpectedWork

__all__ = ["Job", "JobState", "progress", "still_to_do"]

JobState = Literal["new", "interrupted", "failed", "finished"]
STOPPED = {0, BUSY, *(status for number in STOPPING for status in (-number, 128 + number))}  # ended, but not failed
TAIL = 1 << 16  # bytes of the log in which its last event is looked for


@dataclass(frozen=True, eq=False)
class Job:
    """One run: what it is called, what it computes and its folder."""

    label: str
    spec: Spec
    folder: Path

    def prepare(self, registry: Registry) -> None:
        """Writes down what is asked for; a run of the same spec that was begun by other means is taken over.

        Raises:
            FolderError: the place is taken by a run of another spec, or can't be written.
        """
        asked = self._beside("yaml")
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            begun = [path for path in (asked, self.folder / MARK) if path.exists()]
            if begun and read_spec(begun[0], registry).key != self.spec.key:
                raise FolderError(f"{self.folder} was begun with other settings; give another --out")
            if asked not in begun:
                write_atomically(asked, to_yaml(self.spec))
        except FolderError:
            raise
        except OSError as error:
            raise FolderError(f"can't write {self.folder.parent}: {error.strerror or error}") from error

    @property
    def state(self) -> JobState:
        """How far the files say it is; a process may be at work on it besides."""
        recorded = self.summary.get("state")
        if recorded == "finished":
            return "finished"
        if self._beside("failed").exists() or recorded == "failed":
            return "failed"
        return "interrupted" if (self.folder / MARK).exists() else "new"

    @property
    def unfinished(self) -> str:
        """Why there is no result, in words."""
        state, at_work = self.state, busy(self.folder)
        if at_work is not None:
            return f"busy: {at_work}"
        reason = self.reason if state == "failed" else ""
        return f"{state}: {reason}" if reason else state.replace("new", "not begun")

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json, empty where there is none."""
        return read_summary(self.folder)

    @property
    def reason(self) -> str:
        """Why it failed, in one line."""
        try:
            return self._beside("failed").read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            return " ".join(str(self.summary.get("reason", "")).split())

    @property
    def log(self) -> Path:
        """What its processes printed."""
        return self._beside("log")

    def arguments(self) -> list[str]:
        """The command after ``cilnorm`` that begins or continues it."""
        if (self.folder / MARK).exists():
            return ["resume", str(self.folder)]
        return ["run", "--spec", str(self._beside("yaml")), "--out", str(self.folder), "--resume"]

    def begin(self) -> None:
        """Forgets an earlier failure, because a process is at work on it now."""
        self._beside("failed").unlink(missing_ok=True)

    def end(self, code: int) -> None:
        """Takes down that its process ended with ``code``, a negative one being a signal, if that was a failure."""
        if code not in STOPPED:
            self.fail(f"killed by signal {-code}" if code < 0 else self._last_line() or f"exit status {code}")

    def fail(self, why: str) -> None:
        """Takes down why it failed, in one line."""
        with suppress(OSError):  # a full disk, say: the other jobs go on, and this one's own files tell of it
            write_atomically(self._beside("failed"), why + "\n")

    def _beside(self, suffix: str) -> Path:
        return self.folder.with_name(f"{self.folder.name}.{suffix}")

    def _last_line(self) -> str:
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1].removeprefix("cilnorm: ") if lines else ""


def still_to_do(jobs: Sequence[Job], retry_failed: bool) -> list[Job]:
    """Those that are not finished; failed ones only if they are to be tried again."""
    done = ("finished",) if retry_failed else ("finished", "failed")
    return [job for job in jobs if job.state not in done]


def progress(folder: Path, spec: Spec | None = None) -> float:
    """The part of a run that its log says is done, in [0, 1]; phases of one task count as one.

    Args:
        spec: the run's, by which tasks weigh as many steps as they take; without it all weigh the same.
    """
    sizes, done = [1], 0.0
    for event in _last_events(folder / "events.jsonl"):
        if event["event"] == "epoch":
            done = event["task"] - 1 + event["epoch"] / event["of"]
        elif event["event"] == "accuracy":
            done = event["task"]
        elif event["event"] == "run":
            sizes = event.get("sizes") or [1] * event["tasks"]
    weights = ExpectedWork(sizes, spec).weights()
    whole, part = divmod(min(done, len(weights)), 1)
    return sum(weights[: int(whole)]) + (part * weights[int(whole)] if part else 0.0)


def _last_events(path: Path) -> Sequence[dict[str, Any]]:
    """The log's first event, which says how many tasks there are, and its last ones, however long it is."""
    try:
        with os.fdopen(open_plain(path), "rb") as file:
            first = file.readline()
            file.seek(max(len(first), path.stat().st_size - TAIL))
            lines = [first, *file.read().splitlines()]
    except OSError:
        return []
    events = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:  # a line that is cut off at either end
            continue
        if isinstance(event, dict) and "event" in event:
            events.append(event)
    return events
