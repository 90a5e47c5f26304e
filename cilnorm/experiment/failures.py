"""What stops a run is written down: where it stood, and why, in words that name the way out."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from cilnorm.files import in_words
from cilnorm.registry import text_of
from cilnorm.spec import Spec
from cilnorm.storage.checkpoint import RunState
from cilnorm.storage.event_log import EventLog
from cilnorm.storage.events import RunHalted
from cilnorm.storage.interruptions import Interrupted
from cilnorm.storage.run_folder import FolderError, RunFolder
from cilnorm.training.apart import ENDED, lost_others
from cilnorm.training.engine import NonFiniteLoss
from cilnorm.training.epoch_plan import NoBatch

__all__ = ["FolderGone", "RunStopped", "record_failure"]


class RunStopped(RuntimeError):
    """A run could not go on; what was done is kept, and the message says where it stood.

    Attributes:
        cause: where it stood and why, in one line, without the folder.
        told: whether of the processes that share the run another one says why.
    """

    def __init__(self, cause: str, folder: Path, told: bool = False) -> None:
        super().__init__(f"{cause}; what was done is in {folder}")
        self.cause, self.told = cause, told


class FolderGone(RunStopped):
    """The run's folder was moved or removed while it was at work."""

    def __init__(self, cause: str) -> None:
        RuntimeError.__init__(self, cause)
        self.cause = cause


@contextmanager
def record_failure(
    spec: Spec, state: RunState, folder: RunFolder, tell: EventLog, doing: str = "", tasks: int | None = None
) -> Iterator[None]:
    """Says of whatever stops the run in here where and why, in its summary, if the disk still takes it.

    Args:
        doing: where the run stands, if that is before its first task.
        tasks: how many the run learns.

    Raises:
        RunStopped, Interrupted: in place of what was foreseen, and of what a plugin raises to end the process,
            SystemExit say; other errors go on, with a note.
    """
    try:
        yield
    except BaseException as error:
        where, reason = doing or _place(state, tasks), _cause(error, spec)
        try:
            folder.check_place()
        except FolderError as gone:  # whatever it was that failed, this is why, and there is no place to say it
            raise FolderGone(f"{where}: {gone}") from error
        halted = RunHalted(where, reason or text_of(error))
        stopped = isinstance(error, KeyboardInterrupt)
        with suppress(OSError):
            kind = "interrupted" if stopped else "failed"
            facts = {"where": where, "reason": halted.reason}
            folder.write_summary(kind, state, **facts)
        with suppress(Exception):  # a full disk, or a watcher that raises: what stopped the run is what is reported
            tell(halted)
        if isinstance(error, KeyboardInterrupt):
            number = error.number if isinstance(error, Interrupted) else signal.SIGINT
            raise Interrupted(number, f"interrupted at {where}; `cilnorm resume {folder.path}` goes on") from error
        if reason or not isinstance(error, Exception):
            raise RunStopped(f"{where}: {halted.reason}", folder.path, lost_others(error) == ENDED) from error
        error.add_note(f"at {where}; what was done is in {folder.path}")
        raise


def _place(state: RunState, tasks: int | None) -> str:
    """Where a run stands, in words."""
    if state.task == tasks:
        return "after the last task"  # its figures, say
    return f"task {state.task + 1}, epoch {state.epoch + 1}"


def _cause(error: BaseException, spec: Spec) -> str:
    """Why a run stopped, in one line that names the way out; empty for an error that nobody foresaw."""
    current, past = spec.rows
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error):
        where = "GPU memory" if isinstance(error, torch.OutOfMemoryError) else "memory"
        return f"out of {where}: take fewer --rows ({current}:{past} now), a lower precision or a smaller backbone"
    if isinstance(error, OSError):
        return in_words(error)
    if isinstance(error, RunStopped):  # a trial
        return error.cause
    if lost := lost_others(error):
        return f"{lost}; the same command goes on from the last checkpoint"
    return str(error) if isinstance(error, (NonFiniteLoss, NoBatch)) else ""
