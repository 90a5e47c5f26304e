"""CIFAR-10: 60,000 photographs of 10 kinds of thing, 32x32, read from the official Python pickles.

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

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
ARCHIVE_BYTES = 170_498_071
FOLDER = "cifar-10-batches-py"
TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
}
CLASSES, PER_FILE = 10, 10_000
BYTES_LIMIT = 64 << 20  # the official files have 31 MB each


def _release() -> _cifar.Release:
    return _cifar.Release("CIFAR-10", URL, ARCHIVE_MD5, ARCHIVE_BYTES, FOLDER, MD5, BYTES_LIMIT)


def build(root: Path | None = None) -> ImageSet:
    """The set, from ``root``, else the folder named by CILNORM_DATA, else the cache folder; downloaded where absent.

    The folder may be ``cifar-10-batches-py`` itself or the one that holds it. Files that are not the official ones byte
    for byte but hold what they should are taken, with a ``notice``.

    Returns:
        train_images (50000, 3, 32, 32) uint8 and test_images (10000, 3, 32, 32) uint8, in the order of the files.

    Raises:
        DatasetError: the files are absent and cannot be had, or one of them is damaged.
    """
    release = _release()
    folder = _cifar.fetched(release, root, cache_folder)
    record, official = _cifar.read(release, folder / "batches.meta")
    names = _cifar.class_names(folder / "batches.meta", record, "label_names", CLASSES)
    train = [_batch(release, folder / name) for name in TRAIN]
    test_images, test_labels, test_official = _batch(release, folder / "test_batch")
    train_images = np.concatenate([images for images, _, _ in train])
    train_labels = np.concatenate([labels for _, labels, _ in train])
    # The five files are no splits of equal classes; together they are.
    for path, labels in ((folder / "data_batch_*", train_labels), (folder / "test_batch", test_labels)):
        _cifar.check_counts(path, labels, CLASSES, len(labels) // CLASSES)
    known = {name: official for name, (_, _, official) in zip(TRAIN, train, strict=True)}
    return ImageSet(
        train_images=torch.from_numpy(train_images),
        train_labels=torch.from_numpy(train_labels),
        test_images=torch.from_numpy(test_images),
        test_labels=torch.from_numpy(test_labels),
        class_names=names,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2615),
        digest=digest(train_images, train_labels, test_images, test_labels),
        notice=_cifar.notice(release, folder, {**known, "test_batch": test_official, "batches.meta": official}),
    )


def _batch(release: _cifar.Release, path: Path) -> tuple[np.ndarray, np.ndarray, bool]:
    """Images (N, 3, 32, 32) uint8, labels (N,) int64, and whether the file is the official one."""
    record, official = _cifar.read(release, path)
    images = _cifar.images(path, record, PER_FILE)
    return images, _cifar.labels(path, record, "labels", PER_FILE, CLASSES), official


def _found(root: Path | None) -> bool:
    release = _release()
    return bool(_cifar.found(release, _cifar.folder_of(release, root, cache_folder)))


@hookimpl
def cilnorm_datasets() -> list[Dataset]:
    return [Dataset("cifar10", build, found=_found, side=32)]
