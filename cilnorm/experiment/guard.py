"""Nothing else may happen to a run: one process at a time in a folder, signals between two steps, causes in words."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from cilnorm.registry import text_of
from cilnorm.spec import Spec
from cilnorm.storage.checkpoint import State
from cilnorm.storage.event_log import Teller
from cilnorm.storage.run_folder import LOCK, FolderError, RunFolder
from cilnorm.storage.safe_files import in_words, open_plain, read_plain
from cilnorm.training.engine import NonFiniteLoss
from cilnorm.training.protocol import NoBatch

try:
    import fcntl
except ImportError:  # Windows has no such locks; what the file says must do there
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "BUSY",
    "STOPPING",
    "FolderBusy",
    "FolderGone",
    "Interrupted",
    "Interruptions",
    "RunStopped",
    "busy",
    "held",
    "recorded",
]

LOCK_BYTES = 4096  # more than a name and a number take
STATUS = 128  # plus the signal's number is what a shell reports of a command that a signal ended
STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
BUSY = 75  # what a command exits with that found another one at work: sysexits.h's "try again later"


class FolderBusy(FolderError):
    """Another process is at work in the folder; the message has its pid and host.

    Attributes:
        here: whether it is one of this machine, so that it is known to be alive.
        status: what the process should exit with.
    """

    status = BUSY

    def __init__(self, message: str, here: bool = True) -> None:
        super().__init__(message)
        self.here = here


class RunStopped(RuntimeError):
    """A run could not go on; what was done is kept, and the message says where it stood.

    Attributes:
        cause: where it stood and why, in one line, without the folder.
    """

    def __init__(self, cause: str, folder: Path) -> None:
        super().__init__(f"{cause}; what was done is in {folder}")
        self.cause = cause


class FolderGone(RunStopped):
    """The run's folder was moved or removed while it was at work."""

    def __init__(self, cause: str) -> None:
        RuntimeError.__init__(self, cause)
        self.cause = cause


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop; all that was done is saved.

    Attributes:
        status: what the process should exit with, 130 for Ctrl-C.
    """

    def __init__(self, number: int, message: str = "") -> None:
        name = signal.Signals(number).name
        super().__init__(message or f"interrupted by {name}; `cilnorm resume FOLDER` goes on where a run was begun")
        self.number, self.status = number, STATUS + number


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps every other process out of a run's folder, which is made if it is not there.

    The system drops the lock when a process ends, however it ends, so what a dead one left on this host is taken over.
    Where another host's process left its name the system's word does not reach; a person has to judge that.

    Raises:
        FolderBusy: another process is at work there.
        FolderError: the folder can't be written.
    """
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _locked(path)
    except FolderError:
        raise
    except OSError as error:
        reason = in_words(error) if error.filename == str(path) else error.strerror or error
        raise FolderError(f"can't write the run folder {folder}: {reason}") from error
    place = os.open(folder, os.O_RDONLY) if os.name == "posix" else None  # keeps its number from being given again
    try:
        owner = _owner(path)
        host = socket.gethostname()
        if owner and (owner["host"] != host or (fcntl is None and _alive(owner["pid"]))):
            raise _busy(folder, owner)
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": host}).encode(), 0)
        try:
            yield
        finally:
            with suppress(OSError):
                if os.path.samestat(os.fstat(handle), os.lstat(path)):  # not another's, if the folder was moved
                    path.unlink()
    finally:
        if place is not None:
            os.close(place)
        os.close(handle)


def _locked(path: Path) -> int:
    """An open, locked file; whoever unlinks it first makes the others look again."""
    while True:
        handle = open_plain(path, os.O_RDWR | os.O_CREAT)
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.lexists(path) and os.path.samestat(os.fstat(handle), os.lstat(path)):
                if os.fstat(handle).st_nlink == 1:
                    return handle
                path.unlink()  # by its other name it is some other file, and not to be written
        except BlockingIOError:
            os.close(handle)
            raise _busy(path.parent, _owner(path)) from None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _owner(path: Path) -> dict[str, Any] | None:
    """Who says to work in the folder; None where nobody does, or where the file was cut short."""
    try:
        owner = json.loads(read_plain(path, LOCK_BYTES))
        return {"pid": int(owner["pid"]), "host": str(owner["host"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def busy(folder: Path) -> FolderBusy | None:
    """What ``held`` would raise because another process is at work in the folder; nothing is taken or changed."""
    path = folder / LOCK
    owner = _owner(path)
    if owner and owner["host"] != socket.gethostname():
        return _busy(folder, owner)
    if fcntl is None:
        return _busy(folder, owner) if owner and _alive(owner["pid"]) else None
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _busy(folder, owner)
    except OSError:  # no such locks here; whoever begins will be told
        return None
    finally:
        os.close(handle)
    return None


def _busy(folder: Path, owner: dict[str, Any] | None) -> FolderBusy:
    who = f"process {owner['pid']} on {owner['host']}" if owner else "another process"
    here = fcntl is not None and (not owner or owner["host"] == socket.gethostname())
    hint = "" if here else f"; if that one is dead, delete {folder / LOCK}"
    return FolderBusy(f"{folder}: {who} is at work there{hint}", here)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


class Interruptions:
    """Says when a checkpoint is due, and lets Ctrl-C, SIGTERM and a terminal that hangs up wait until it is written.

    Between steps a signal only asks; elsewhere, and the second time, it interrupts at once. Use as a context manager,
    which puts the handlers back; outside the main thread, and where somebody else handles signals, it handles none.

    Args:
        every: seconds between checkpoints within an epoch; None for none.
    """

    def __init__(self, every: float | None = None) -> None:
        self._every, self._last = every, time.monotonic()
        self._asked, self._waiting = 0, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruptions:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
                if signal.getsignal(number) is default:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked or not self._waiting:
            raise Interrupted(number)
        self._asked = number

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Signals wait in here."""
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False
        self._raise()

    @property
    def due(self) -> bool:
        """Whether it is time for a checkpoint."""
        late = self._every is not None and time.monotonic() - self._last >= self._every
        return bool(self._asked) or late

    def saved(self) -> None:
        """To be called when a checkpoint was written.

        Raises:
            Interrupted: a signal came.
        """
        self._last = time.monotonic()
        self._raise()

    def _raise(self) -> None:
        if self._asked:
            raise Interrupted(self._asked)


@contextmanager
def recorded(spec: Spec, state: State, folder: RunFolder, tell: Teller, doing: str = "") -> Iterator[None]:
    """Says of whatever stops the run in here where and why, in its summary, if the disk still takes it.

    Args:
        doing: where the run stands, if that is before its first task.

    Raises:
        RunStopped, Interrupted: in place of what was foreseen, and of what a plugin raises to end the process,
            SystemExit say; other errors go on, with a note.
    """
    try:
        yield
    except BaseException as error:
        where, reason = doing or f"task {state.task + 1}, epoch {state.epoch + 1}", _cause(error, spec)
        try:
            folder.check_place()
        except FolderError as gone:  # whatever it was that failed, this is why, and there is no place to say it
            raise FolderGone(f"{where}: {gone}") from error
        told = {"where": where, "reason": reason or text_of(error)}
        stopped = isinstance(error, KeyboardInterrupt)
        with suppress(OSError):
            folder.write_summary("interrupted" if stopped else "failed", state.matrix, state.by_head, **told)
            folder.log({"event": "stopped", **told, "seconds": round(tell.seconds, 3)})
        if isinstance(error, KeyboardInterrupt):
            number = error.number if isinstance(error, Interrupted) else signal.SIGINT
            raise Interrupted(number, f"interrupted at {where}; `cilnorm resume {folder.path}` goes on") from error
        if reason or not isinstance(error, Exception):
            raise RunStopped(f"{where}: {told['reason']}", folder.path) from error
        error.add_note(f"at {where}; what was done is in {folder.path}")
        raise


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
    return str(error) if isinstance(error, (NonFiniteLoss, NoBatch)) else ""
