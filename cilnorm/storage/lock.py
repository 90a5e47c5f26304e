"""One process at a time in a run's folder."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cilnorm.files import in_words, open_plain, read_plain
from cilnorm.storage.run_folder import LOCK, FolderError

try:
    import fcntl
except ImportError:  # Windows has no such locks; what the file says must do there
    fcntl = None  # type: ignore[assignment]

__all__ = ["BUSY", "FolderBusy", "busy", "lock_folder"]

LOCK_BYTES = 4096  # more than a name and a number take
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


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
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
    """What ``lock_folder`` would raise because another process is at work in the folder; changes nothing."""
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
