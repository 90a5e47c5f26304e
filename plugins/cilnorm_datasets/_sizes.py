"""Square images made smaller by averaging."""

from __future__ import annotations

import numpy as np

from cilnorm.images import DatasetError


def check_size(name: str, side: int, size: int) -> None:
    """Raises DatasetError where images of ``side`` pixels can't be averaged to ``size``."""
    if size < 1 or side % size:
        raise DatasetError(f"{name} has images of {side} pixels; size must divide that, {size} does not")


def averaged(images: np.ndarray, size: int) -> np.ndarray:
    """Images (N, 3, size, size) uint8 of (N, 3, side, side): means over squares of pixels, halves rounded up."""
    factor = images.shape[-1] // size
    if factor == 1:
        return images
    squares = images.reshape(len(images), 3, size, factor, size, factor)
    area = factor * factor
    means = (squares.sum((3, 5), dtype=np.uint32) + area // 2) // area
    return means.astype(np.uint8)
