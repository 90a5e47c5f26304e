"""A data set as plain arrays, or as files to be decoded: what a data set plugin returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "DatasetError", "ImageFiles", "ImageSet"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DatasetError(ValueError):
    """A data set is missing or damaged; the message is for the user."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A data set as plain arrays.

    Attributes:
        train_images: (N, 3, H, W) uint8; may be backed by a file, and is only read.
        train_labels: (N,) int64, the source's own labels 0 .. classes-1.
        test_images, test_labels: likewise.
        class_names: one a class.
        mean, std: per-channel statistics of images scaled to [0, 1].
        digest: SHA-256 of pixels and labels, hexadecimal; a run refuses a set without one.
        notice: a warning for the user; empty where there is none.
        file: one that holds nothing but the pixels of all training images and then of all test images, if there is one;
            what does not fit the device is read from it.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    digest: str = ""
    notice: str = ""
    file: Path | None = None

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """A data set as files of images, which are decoded once and kept, see ``cilnorm.data.pixel_cache``.

    Attributes:
        name: what the user calls the data set.
        root: the folder that all paths are relative to.
        train, test: (path, label) of each image, with "/" between folders; labels are 0 .. classes-1.
        class_names: one a class.
        size: side in pixels of the squares that are kept: an image's shorter side is resized to it and the centre
            kept. Crops are taken inside of that square.
        mean, std: per-channel statistics of images scaled to [0, 1].
        damaged: what to do where files can't be decoded: ``stop`` and name them, or ``skip`` them with a notice.
        notice: a warning for the user; empty where there is none.
    """

    name: str
    root: Path
    train: Sequence[tuple[str, int]]
    test: Sequence[tuple[str, int]]
    class_names: tuple[str, ...]
    size: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    damaged: Literal["stop", "skip"] = "stop"
    notice: str = ""

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)
