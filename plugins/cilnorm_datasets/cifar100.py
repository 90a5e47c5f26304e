"""CIFAR-100: 60,000 photographs of 100 kinds of thing, 32x32, read from the official Python pickles.

https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from cilnorm.hookspecs import Dataset, hookimpl
from cilnorm.images import ImageSet

from . import _cifar
from ._files import cache_folder, digest
from ._sizes import averaged, check_size

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

# The official train has 155 MB. Python 3 writes protocol 2's bytes as text, one and a half bytes a pixel: 222 MB.
BYTES_LIMIT = 256 << 20


def _release() -> _cifar.Release:
    return _cifar.Release("CIFAR-100", URL, ARCHIVE_MD5, ARCHIVE_BYTES, FOLDER, MD5, BYTES_LIMIT)


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
    check_size("cifar100", SIDE, size)
    release = _release()
    folder = _cifar.fetched(release, root, cache_folder)
    official = {}
    record, official["meta"] = _cifar.read(release, folder / "meta")
    names = _cifar.class_names(folder / "meta", record, "fine_label_names", CLASSES)
    train_images, train_labels, official["train"] = _split(folder / "train")
    test_images, test_labels, official["test"] = _split(folder / "test")
    train_images, test_images = averaged(train_images, size), averaged(test_images, size)
    return ImageSet(
        train_images=torch.from_numpy(train_images),
        train_labels=torch.from_numpy(train_labels),
        test_images=torch.from_numpy(test_images),
        test_labels=torch.from_numpy(test_labels),
        class_names=names,
        mean=(0.5071, 0.4866, 0.4409),
        std=(0.2009, 0.1984, 0.2023),
        digest=digest(train_images, train_labels, test_images, test_labels),
        notice=_cifar.notice(release, folder, official),
    )


def _split(path: Path) -> tuple[np.ndarray, np.ndarray, bool]:
    """Images (N, 3, 32, 32) uint8, labels (N,) int64, and whether the file is the official one."""
    record, official = _cifar.read(_release(), path)
    count = CLASSES * PER_CLASS[path.name]
    images = _cifar.images(path, record, count)
    labels = _cifar.labels(path, record, "fine_labels", count, CLASSES)
    _cifar.check_counts(path, labels, CLASSES, PER_CLASS[path.name])
    return images, labels, official


def _found(root: Path | None) -> bool:
    release = _release()
    return bool(_cifar.found(release, _cifar.folder_of(release, root, cache_folder)))


@hookimpl
def cilnorm_datasets() -> list[Dataset]:
    return [Dataset("cifar100", build, found=_found)]
