"""CIFAR-100: 60,000 photographs of 100 kinds of thing, 32x32, read from the official Python pickles.

https://www.cs.toronto.edu/~kriz/cifar.html

The pickles are run where they can do no harm, see ``load_pickle``. Whatever stands in them is checked before use.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cilnorm.hookspecs import Dataset, hookimpl
from cilnorm.images import DatasetError, ImageSet

from ._files import ArrayState, cache_folder, digest, load_pickle, temporary

URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
ARCHIVE_MD5 = "eb9058c3a382ffc7106e4002c42a8d85"
ARCHIVE_BYTES = 169_001_437
FOLDER = "cifar-100-python"
MD5 = {
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}
PER_CLASS = {"train": 500, "test": 100}
CLASSES, SIDE = 100, 32
PIXELS = 3 * SIDE * SIDE

# The official train has 155 MB. Python 3 writes protocol 2's bytes as text, one and a half bytes a pixel: 222 MB.
BYTES_LIMIT = 256 << 20


def build(root: Path | None = None, size: int = SIDE) -> ImageSet:
    """The set, from ``root``, else the folder named by CILNORM_DATA, else the cache folder; downloaded where absent.

    The folder may be ``cifar-100-python`` itself or the one that holds it. Files that are not the official ones byte
    for byte but hold what they should are taken, with a ``notice``.

    Args:
        root: the folder to look in; None as said above.
        size: side of the images in pixels; a smaller one than 32, which it must divide, is made by averaging.

    Returns:
        train_images (50000, 3, 32, 32) uint8 and test_images (10000, 3, 32, 32) uint8, in the order of the files.

    Raises:
        DatasetError: the files are absent and cannot be had, or one of them is damaged.
    """
    if size < 1 or SIDE % size:
        raise DatasetError(f"cifar100 has images of {SIDE} pixels; size must divide that, {size} does not")
    folder = _folder(root)
    if not _found(folder):
        _download(folder)
    official = {}
    names, official["meta"] = _names(folder / "meta")
    train_images, train_labels, official["train"] = _split(folder / "train")
    test_images, test_labels, official["test"] = _split(folder / "test")
    train_images, test_images = _averaged(train_images, size), _averaged(test_images, size)
    others = " and ".join(name for name in MD5 if not official[name])
    return ImageSet(
        train_images=torch.from_numpy(train_images),
        train_labels=torch.from_numpy(train_labels),
        test_images=torch.from_numpy(test_images),
        test_labels=torch.from_numpy(test_labels),
        class_names=names,
        mean=(0.5071, 0.4866, 0.4409),
        std=(0.2009, 0.1984, 0.2023),
        digest=digest(train_images, train_labels, test_images, test_labels),
        notice=others and f"{others} in {folder}: not the official files (md5 differs), though of the same form",
    )


def _averaged(images: np.ndarray, size: int) -> np.ndarray:
    """Images (N, 3, size, size) uint8: means over squares of pixels, halves rounded up."""
    factor = SIDE // size
    if factor == 1:
        return images
    squares = images.reshape(len(images), 3, size, factor, size, factor)
    area = factor * factor
    means = (squares.sum((3, 5), dtype=np.uint32) + area // 2) // area
    return means.astype(np.uint8)


def _folder(root: Path | None) -> Path:
    """Where the three files are, or would be put."""
    place = root or Path(os.environ.get("CILNORM_DATA") or cache_folder())
    return place if place.name == FOLDER or _found(place) else place / FOLDER


def _found(folder: Path) -> list[str]:
    return [name for name in MD5 if os.path.isfile(folder / name)]  # Path.is_file raises where it may not look


def _download(folder: Path) -> None:
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
            _fetch(part / "archive")
            _extract(part / "archive", part)
            try:
                (part / FOLDER).replace(folder)
            except OSError:  # fine where another run was quicker
                if len(_found(folder)) < len(MD5):
                    raise
    except (OSError, HTTPException, tarfile.TarError, EOFError, zlib.error) as error:
        raise DatasetError(
            f"CIFAR-100 is not in {folder}, and fetching {URL} failed: {_line(error)}. Put train, test and meta of that"
            " archive there, or name the folder that has them with --data-root or CILNORM_DATA; or connect to the"
            " network and try again."
        ) from error


def _fetch(path: Path) -> None:
    from urllib.request import urlopen

    from rich.console import Console
    from rich.progress import wrap_file

    md5 = hashlib.md5(usedforsecurity=False)
    size = 0
    with urlopen(URL, timeout=30) as response, path.open("xb") as target:
        console = Console(stderr=True)
        with wrap_file(response, ARCHIVE_BYTES, description="CIFAR-100", console=console, transient=True) as source:
            while size <= ARCHIVE_BYTES and (chunk := source.read(1 << 20)):
                target.write(chunk)
                md5.update(chunk)
                size += len(chunk)
    if md5.hexdigest() != ARCHIVE_MD5:
        raise OSError(f"what came ({size} bytes) is not the official archive (md5 {md5.hexdigest()})")


def _extract(archive: Path, folder: Path) -> None:
    """Unpack the three files, and refuse the whole archive if any member would leave the folder."""
    import tarfile

    with tarfile.open(archive, "r:gz") as tar:
        members = [tarfile.data_filter(member, str(folder)) for member in tar]
        wanted = [member for member in members if member.isfile() and member.name in {f"{FOLDER}/{n}" for n in MD5}]
        tar.extractall(folder, wanted, filter="data")


def _names(path: Path) -> tuple[tuple[str, ...], bool]:
    """The classes' names, and whether the file is the official one."""
    record, official = _read(path)
    names = record.get(b"fine_label_names")
    if type(names) is not list or len(names) != CLASSES or set(map(type, names)) != {bytes}:
        raise DatasetError(f"{path}: fine_label_names is not a list of {CLASSES} names")
    return tuple(name.decode("utf-8", "replace") for name in names), official


def _split(path: Path) -> tuple[np.ndarray, np.ndarray, bool]:
    """Images (N, 3, 32, 32) uint8, labels (N,) int64, and whether the file is the official one."""
    record, official = _read(path)
    per_class = PER_CLASS[path.name]
    count = CLASSES * per_class
    pixels, labels = record.get(b"data"), record.get(b"fine_labels")
    if not isinstance(pixels, ArrayState) or pixels.kind not in ("u1", b"u1"):
        raise DatasetError(f"{path}: data is not an array of uint8")
    if pixels.shape != (count, PIXELS) or pixels.fortran:
        raise DatasetError(f"{path}: data is not of shape ({count}, {PIXELS}) row by row")
    if type(pixels.data) is not bytes or len(pixels.data) != count * PIXELS:
        raise DatasetError(f"{path}: data does not hold {count} images")
    # Python's own integers, looked at as such: they may be too large for any array.
    if type(labels) is not list or len(labels) != count or set(map(type, labels)) != {int}:
        raise DatasetError(f"{path}: fine_labels is not a list of {count} integers")
    if min(labels) < 0 or max(labels) >= CLASSES:
        raise DatasetError(f"{path}: fine_labels holds labels outside 0 to {CLASSES - 1}")
    classes = np.array(labels, dtype=np.int64)
    if (np.bincount(classes, minlength=CLASSES) != per_class).any():
        raise DatasetError(f"{path}: not every class has {per_class} images")
    images = np.frombuffer(pixels.data, np.uint8).reshape(count, 3, SIDE, SIDE).copy()  # torch wants it writable
    return images, classes, official


def _read(path: Path) -> tuple[dict[Any, Any], bool]:
    """What a file holds, arrays as ``ArrayState``, and whether it is the official file."""
    try:
        if path.stat().st_size > BYTES_LIMIT:
            raise DatasetError(f"{path}: larger than {BYTES_LIMIT >> 20} MiB, which no file of CIFAR-100 is")
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DatasetError(f"{path}: missing") from None
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror})") from error
    official = hashlib.md5(raw, usedforsecurity=False).hexdigest() == MD5[path.name]
    try:
        record = load_pickle(raw, trusted=official)
    except Exception as error:  # a damaged pickle can fail in any way that Python can
        raise DatasetError(f"{path}: truncated, damaged or not a file of CIFAR-100 ({_line(error)})") from error
    if type(record) is not dict:
        raise DatasetError(f"{path}: not a dictionary")
    return record, official


def _line(error: BaseException) -> str:
    """An error in one line; a damaged file can put anything into its words."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


@hookimpl
def cilnorm_datasets() -> list[Dataset]:
    return [Dataset("cifar100", build, found=lambda root: bool(_found(_folder(root))))]
