"""What CIFAR-10 and CIFAR-100 share: their archive, and their files, which are pickles.

The pickles are run where they can do no harm, see ``load_pickle``. Whatever stands in them is checked before use.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cilnorm.images import DatasetError

from ._files import ArrayState, load_pickle, temporary

__all__ = [
    "Release",
    "check_counts",
    "class_names",
    "fetched",
    "folder_of",
    "found",
    "images",
    "labels",
    "notice",
    "read",
]

SIDE = 32
PIXELS = 3 * SIDE * SIDE


@dataclass(frozen=True)
class Release:
    """An archive as it was published: ``folder`` in it has the files of ``md5``, of at most ``bytes_limit`` each."""

    name: str
    url: str
    archive_md5: str
    archive_bytes: int
    folder: str
    md5: Mapping[str, str]
    bytes_limit: int


def fetched(release: Release, root: Path | None, cache_folder: Callable[[], Path]) -> Path:
    """The folder with the files, downloaded where none of them is there.

    Raises:
        DatasetError: they are absent and cannot be had.
    """
    folder = folder_of(release, root, cache_folder)
    if not found(release, folder):
        _download(release, folder)
    return folder


def folder_of(release: Release, root: Path | None, cache_folder: Callable[[], Path]) -> Path:
    """Where the files are, or would be put."""
    place = root or Path(os.environ.get("CILNORM_DATA") or cache_folder())
    return place if place.name == release.folder or found(release, place) else place / release.folder


def found(release: Release, folder: Path) -> list[str]:
    """Those of the files that are there."""
    # Path.is_file raises where it may not look.
    return [name for name in release.md5 if os.path.isfile(folder / name)]


def notice(release: Release, folder: Path, official: Mapping[str, bool]) -> str:
    """A warning that names files which are not the official ones, if there are any."""
    others = " and ".join(name for name in release.md5 if not official[name])
    return others and f"{others} in {folder}: not the official files (md5 differs), though of the same form"


def _download(release: Release, folder: Path) -> None:
    """Fetch the archive and make ``folder`` of it, whole or not at all.

    Raises:
        DatasetError: that did not work; says what the user can do.
    """
    import tarfile
    import zlib
    from http.client import HTTPException

    try:
        with temporary(folder) as part:
            part.mkdir()
            _fetch(release, part / "archive")
            _extract(release, part / "archive", part)
            try:
                (part / release.folder).replace(folder)
            except OSError:  # fine where another run was quicker
                if len(found(release, folder)) < len(release.md5):
                    raise
    except (OSError, HTTPException, tarfile.TarError, EOFError, zlib.error) as error:
        names = list(release.md5)
        raise DatasetError(
            f"{release.name} is not in {folder}, and fetching {release.url} failed: {_line(error)}. Put"
            f" {', '.join(names[:-1])} and {names[-1]} of that archive there, or name the folder that has them with"
            " --data-root or CILNORM_DATA; or connect to the network and try again."
        ) from error


def _fetch(release: Release, path: Path) -> None:
    from urllib.request import urlopen

    from rich.console import Console
    from rich.progress import wrap_file

    md5 = hashlib.md5(usedforsecurity=False)
    size, limit = 0, release.archive_bytes
    with urlopen(release.url, timeout=30) as response, path.open("xb") as target:
        console = Console(stderr=True)
        with wrap_file(response, limit, description=release.name, console=console, transient=True) as source:
            while size <= limit and (chunk := source.read(1 << 20)):
                target.write(chunk)
                md5.update(chunk)
                size += len(chunk)
    if md5.hexdigest() != release.archive_md5:
        raise OSError(f"what came ({size} bytes) is not the official archive (md5 {md5.hexdigest()})")


def _extract(release: Release, archive: Path, folder: Path) -> None:
    """Unpack the files, and refuse the whole archive if any member would leave the folder."""
    import tarfile

    wanted = {f"{release.folder}/{name}" for name in release.md5}
    with tarfile.open(archive, "r:gz") as tar:
        members = [tarfile.data_filter(member, str(folder)) for member in tar]
        tar.extractall(folder, [m for m in members if m.isfile() and m.name in wanted], filter="data")


def class_names(path: Path, record: Mapping[Any, Any], key: str, classes: int) -> tuple[str, ...]:
    """The classes' names, in the order of their labels.

    Raises:
        DatasetError: they are not there.
    """
    names = record.get(key.encode())
    if type(names) is not list or len(names) != classes or set(map(type, names)) != {bytes}:
        raise DatasetError(f"{path}: {key} is not a list of {classes} names")
    return tuple(name.decode("utf-8", "replace") for name in names)


def images(path: Path, record: Mapping[Any, Any], count: int) -> np.ndarray:
    """Images (count, 3, 32, 32) uint8.

    Raises:
        DatasetError: they are not there.
    """
    pixels = record.get(b"data")
    if not isinstance(pixels, ArrayState) or pixels.kind not in ("u1", b"u1"):
        raise DatasetError(f"{path}: data is not an array of uint8")
    if pixels.shape != (count, PIXELS) or pixels.fortran:
        raise DatasetError(f"{path}: data is not of shape ({count}, {PIXELS}) row by row")
    if type(pixels.data) is not bytes or len(pixels.data) != count * PIXELS:
        raise DatasetError(f"{path}: data does not hold {count} images")
    # Torch wants it writable.
    return np.frombuffer(pixels.data, np.uint8).reshape(count, 3, SIDE, SIDE).copy()


def labels(path: Path, record: Mapping[Any, Any], key: str, count: int, classes: int) -> np.ndarray:
    """Labels (count,) int64.

    Raises:
        DatasetError: they are not there, or no class has that number.
    """
    found = record.get(key.encode())
    # Python's own integers, looked at as such: they may be too large for any array.
    if type(found) is not list or len(found) != count or set(map(type, found)) != {int}:
        raise DatasetError(f"{path}: {key} is not a list of {count} integers")
    if min(found) < 0 or max(found) >= classes:
        raise DatasetError(f"{path}: {key} holds labels outside 0 to {classes - 1}")
    return np.array(found, dtype=np.int64)


def check_counts(path: Path, labels: np.ndarray, classes: int, per_class: int) -> None:
    """Counts the images of every class.

    Raises:
        DatasetError: some class has more or fewer than ``per_class``.
    """
    if (np.bincount(labels, minlength=classes) != per_class).any():
        raise DatasetError(f"{path}: not every class has {per_class} images")


def read(release: Release, path: Path) -> tuple[dict[Any, Any], bool]:
    """What a file holds, arrays as ``ArrayState``, and whether it is the official file.

    Raises:
        DatasetError: it is missing or damaged.
    """
    try:
        if path.stat().st_size > release.bytes_limit:
            limit = release.bytes_limit >> 20
            raise DatasetError(f"{path}: larger than {limit} MiB, which no file of {release.name} is")
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DatasetError(f"{path}: missing") from None
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror})") from error
    official = hashlib.md5(raw, usedforsecurity=False).hexdigest() == release.md5[path.name]
    try:
        record = load_pickle(raw, trusted=official)
    except Exception as error:  # a damaged pickle can fail in any way that Python can
        raise DatasetError(f"{path}: truncated, damaged or not a file of {release.name} ({_line(error)})") from error
    if type(record) is not dict:
        raise DatasetError(f"{path}: not a dictionary")
    return record, official


def _line(error: BaseException) -> str:
    """An error in one line; a damaged file can put anything into its words."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
