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

from cilnorm.checkpoint import State
from cilnorm.engine import NonFiniteLoss
from cilnorm.events import Teller
from cilnorm.folder import LOCK, FolderError, RunFolder
from cilnorm.protocol import NoBatch
from cilnorm.spec import Spec

try:
    import fcntl
except ImportError:  # Windows has no such locks; what the file says must do there
    fcntl = None  # type: ignore[assignment]

__all__ = ["Interrupted", "Interruptions", "RunStopped", "held", "recorded"]

STATUS = 128  # plus the signal's number is what a shell reports of a command that a signal ended


class RunStopped(RuntimeError):
    """A run could not go on; what was done is kept, and the message says where it stood."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop; all that was done is saved.

    Attributes:
        status: what the process should exit with, 130 for Ctrl-C.
    """

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message or signal.Signals(number).name)
        self.number, self.status = number, STATUS + number


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps every other process out of a run's folder, which is made if it is not there.

    The system drops the lock when a process ends, however it ends, so what a dead one left on this host is taken over.
    Where another host's process left its name the system's word does not reach; a person has to judge that.

    Raises:
        FolderError: another process is at work there; the message has its pid and host.
    """
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _locked(path)
    except FolderError:
        raise
    except OSError as error:
        raise FolderError(f"can't write the run folder {folder}: {error.strerror or error}") from error
    try:
        owner = _owner(path)
        host = socket.gethostname()
        if owner and (owner["host"] != host or (fcntl is None and _alive(owner["pid"]))):
            raise FolderError(f"{_busy(folder, owner)}; if that one is dead, delete {path}")
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": host}).encode(), 0)
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()
    finally:
        os.close(handle)


def _locked(path: Path) -> int:
    """An open, locked file; whoever unlinks it first makes the others look again."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        except BlockingIOError:
            os.close(handle)
            raise FolderError(_busy(path.parent, _owner(path))) from None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _owner(path: Path) -> dict[str, Any] | None:
    """Who says to work in the folder; None where nobody does, or where the file was cut short."""
    try:
        owner = json.loads(path.read_bytes())
        return {"pid": int(owner["pid"]), "host": str(owner["host"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _busy(folder: Path, owner: dict[str, Any] | None) -> str:
    who = f"process {owner['pid']} on {owner['host']}" if owner else "another process"
    return f"{folder}: {who} is at work there"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


class Interruptions:
    """Says when a checkpoint is due, and lets Ctrl-C and SIGTERM wait until it is written.

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
            for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
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
def recorded(spec: Spec, state: State, folder: RunFolder, tell: Teller) -> Iterator[None]:
    """Says of whatever stops the run in here where and why, in its summary, if the disk still takes it.

    Raises:
        RunStopped, Interrupted: in place of what was foreseen; other errors go on, with a note.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        where, reason = f"task {state.task + 1}, epoch {state.epoch + 1}", _cause(error, spec)
        told = {"where": where, "reason": reason or f"{type(error).__name__}: {error}".rstrip(": ")}
        with suppress(OSError):
            kind = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            folder.write_summary(kind, state.matrix, state.by_head, **told)
            folder.log({"event": "stopped", **told, "seconds": round(tell.seconds, 3)})
        if isinstance(error, KeyboardInterrupt):
            number = error.number if isinstance(error, Interrupted) else signal.SIGINT
            raise Interrupted(number, f"interrupted at {where}; `cilnorm resume {folder.path}` goes on") from error
        if reason:
            raise RunStopped(f"{where}: {reason}; what was done is in {folder.path}") from error
        error.add_note(f"at {where}; what was done is in {folder.path}")
        raise


def _cause(error: BaseException, spec: Spec) -> str:
    """Why a run stopped, in one line that names the way out; empty for an error that nobody foresaw."""
    current, past = spec.rows
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error):
        where = "GPU memory" if isinstance(error, torch.OutOfMemoryError) else "memory"
        return f"out of {where}: take fewer --rows ({current}:{past} now), a lower precision or a smaller backbone"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error) if isinstance(error, (NonFiniteLoss, NoBatch)) else ""
