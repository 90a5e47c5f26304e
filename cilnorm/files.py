"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

__all__ = ["remove_parts", "write_atomically"]

PART = ".part"


def write_atomically(path: Path, content: str | bytes, keep: Path | None = None) -> None:
    """Writes to a temporary name beside ``path``, flushes it to the disk, renames it and flushes the folder.

    Args:
        keep: what stood at ``path`` goes there, over what stands there, before the new file takes its place. A crash
            between the two leaves the old file, whole, under this name alone.

    Raises:
        OSError: as the system reports it; the old file is then whole, at ``path`` or at ``keep``.
    """
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART)
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


def remove_parts(folder: Path) -> None:
    """Removes what ``write_atomically`` left under temporary names when it was killed."""
    for path in folder.rglob(f".*{PART}"):
        path.unlink(missing_ok=True)
