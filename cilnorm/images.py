"""A data set as plain arrays: what a data set plugin returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["DatasetError", "ImageSet"]


class DatasetError(ValueError):
    """A data set is missing or damaged; the message is for the user."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A data set as plain arrays.

    Attributes:
        train_images: (N, 3, H, W) uint8.
        train_labels: (N,) int64, the source's own labels 0 .. classes-1.
        test_images, test_labels: likewise.
        class_names: one a class.
        mean, std: per-channel statistics of images scaled to [0, 1].
        digest: SHA-256 of pixels and labels, hexadecimal.
        notice: a warning for the user; empty where there is none.
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

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)
