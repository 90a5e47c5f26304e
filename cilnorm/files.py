"""Files that are there whole or not at all, and files of others that are opened only if they are plain files."""

from __future__ import annotations

import errno
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

__all__ = ["PART", "in_words", "naming", "open_plain", "plain_folder", "read_plain", "read_text", "write_atomically"]

PART = ".part"
# Never through a link; a pipe must not keep us waiting; Windows would translate line ends. What a system lacks is 0.
PLAIN = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
KINDS = {
    stat.S_IFLNK: "a symbolic link", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder",
    stat.S_IFREG: "a file", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip


def open_plain(path: Path, flags: int = os.O_RDONLY) -> int:
    """Opens a file of a run, whose folder anybody may have made; returns a handle as ``os.open`` does.

    Every file of a run is opened here, or written anew by ``write_atomically``, which opens none.

    Args:
        flags: those of ``os.open``.

    Raises:
        OSError: as the system reports it; also if there is a link, a pipe, a device or a folder of that name.
    """
    try:
        _look(path, os.lstat(path).st_mode)
    except FileNotFoundError:
        if not flags & os.O_CREAT:
            raise
    handle = os.open(path, flags | PLAIN, 0o666)
    try:
        _look(path, os.fstat(handle).st_mode)
    except OSError:
        os.close(handle)
        raise
    return handle


def _look(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = KINDS.get(stat.S_IFMT(mode), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}; runs open plain files alone", str(path))


def read_plain(path: Path, most: int = -1) -> bytes:
    """The content of a file of a run, or its first ``most`` bytes.

    Raises:
        OSError: as ``open_plain``.
    """
    file: BinaryIO
    with os.fdopen(open_plain(path), "rb") as file:
        return file.read(most)


def read_text(path: Path) -> str:
    """The same as text.

    Raises:
        OSError: as ``open_plain``.
        ValueError: it is no UTF-8.
    """
    return read_plain(path).decode("utf-8")


def plain_folder(path: Path) -> bool:
    """Whether there is a folder, and no link to one.

    Raises:
        OSError: there is something else.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISDIR(mode):
        kind = KINDS.get(stat.S_IFMT(mode), "something else")
        raise NotADirectoryError(errno.ENOTDIR, f"it is {kind}; a run needs a folder of its own there", str(path))
    return True


def in_words(error: OSError) -> str:
    """What the system reports, with the file if it names one."""
    text = error.strerror or str(error)
    if not (isinstance(error.filename, str) and error.strerror):
        return text
    path = Path(error.filename)
    whole = path.name[1:].rpartition(PART)[0].rpartition(".")[0] if path.name.endswith(PART) else path.name
    return f"{path.with_name(whole or path.name)}: {text}"


def write_atomically(path: Path, content: str | bytes, keep: Path | None = None) -> None:
    """Writes to a temporary name beside ``path``, flushes it to the disk, renames it and flushes the folder.

    What processes left under such names of ``path`` when they were killed is removed.

    Args:
        keep: what stood at ``path`` goes there, over what stands there, before the new file takes its place. A crash
            between the two leaves the old file, whole, under this name alone.

    Raises:
        OSError: as the system reports it, with ``path`` where it names no file; the old file is then whole, at ``path``
            or at ``keep``.
    """
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content  # a path may be no UTF-8
    _remove_left_parts(path)
    with naming(path), _new_part(path) as (handle, temporary):
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)  # mkstemp's 0600 would keep colleagues out
            if keep is not None and path.exists():
                os.replace(path, keep)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    _flush_folder(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError that comes out of here names ``path`` if it names no file, as that of a full disk does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.strerror:
            error.filename = str(path)
        raise


@contextmanager
def _new_part(path: Path) -> Iterator[tuple[int, str]]:
    """A new file beside ``path``: a handle, which the caller closes, and its name; locked to the end of the context.

    The lock tells other writers of ``path`` that this one is alive.
    """
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART)
        with suppress(BlockingIOError):
            _lock(handle)
            if os.path.lexists(name):
                break
        os.close(handle)  # another writer took it, not yet locked, for one that was left
    guard = os.dup(handle) if fcntl is not None else None  # Windows renames no file that is open
    try:
        yield handle, name
    finally:
        if guard is not None:
            os.close(guard)


def _remove_left_parts(path: Path) -> None:
    """Removes temporary files of ``path`` that no living process holds; where that can't be told, they stay."""
    ours = re.compile(re.escape(f".{path.name}.") + f"[a-z0-9_]{{8}}{re.escape(PART)}")  # as mkstemp names them
    with suppress(OSError):
        for name in os.listdir(path.parent):
            if ours.fullmatch(name):
                with suppress(OSError):
                    _remove_if_left(path.with_name(name))


def _remove_if_left(part: Path) -> None:
    handle = open_plain(part, os.O_RDWR)  # what some network file systems lock must be open for writing
    try:
        if _lock(handle):
            part.unlink()
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    """Locks an open file; False where there are no such locks.

    Raises:
        BlockingIOError: another process holds it.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _flush_folder(path: Path) -> None:
    """Makes the names in a folder survive a power loss, where the system can."""
    if os.name == "nt":  # folders can't be opened there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no such thing
            raise
    finally:
        os.close(handle)
