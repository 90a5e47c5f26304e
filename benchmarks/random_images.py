"""Noise in the size of CIFAR-100, as a data set: a step on it costs what a step on the real images costs."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from cilnorm.hookspecs import Dataset, hookimpl
from cilnorm.images import ImageSet


@functools.cache
def noise(root: Path | None, *, classes: int = 100, train: int = 500, test: int = 100, size: int = 32) -> ImageSet:
    """``train`` and ``test`` images of every class; always the same."""
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (count * classes, 3, size, size)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        return images, torch.arange(classes).repeat(count)

    names = tuple(f"noise {number}" for number in range(classes))
    return ImageSet(*split(train), *split(test), names, (0.5,) * 3, (0.29,) * 3, digest="of-noise")


@hookimpl
def cilnorm_datasets() -> list[Dataset]:
    return [Dataset("random-images", noise)]
