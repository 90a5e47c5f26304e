"""The batches of a planned epoch: what is drawn goes to the device at once, pixels are touched step by step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cilnorm.batch import Batch, Composition
from cilnorm.training.epoch_plan import EpochPlan
from cilnorm.training.pixels import Pixels, Views

__all__ = ["EpochBatches", "draw_batches"]


@dataclass(frozen=True, eq=False)
class EpochBatches:
    """An epoch's batches, none of them made yet.

    Attributes:
        pixels: the images, on the device.
        indices, targets: (steps, rows), there too.
        views: how each image is looked at, (steps, rows).
        composition: of every batch.
    """

    pixels: Pixels
    indices: Tensor
    targets: Tensor
    views: Views
    composition: Composition

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Batch]:
        return (self.batch(step) for step in range(len(self)))

    def batch(self, step: int | Tensor) -> Batch:
        """A step's batch, augmented.

        Args:
            step: its number; or a tensor (1,) on the device that holds it, which is not read back from there.
        """

        def row(plan: Tensor) -> Tensor:
            return plan.index_select(0, step)[0] if isinstance(step, Tensor) else plan[step]

        images = self.pixels.augmented(row(self.indices), self.views.each(row))
        return Batch(images, row(self.targets), self.composition)

    def clone(self) -> EpochBatches:
        """The same epoch in memory of its own; the pixels are shared."""
        views = self.views.each(torch.clone)
        return EpochBatches(self.pixels, self.indices.clone(), self.targets.clone(), views, self.composition)

    def copy_(self, other: EpochBatches) -> None:
        """Takes over another epoch of as many steps and rows, in the same memory."""
        self.indices.copy_(other.indices)
        self.targets.copy_(other.targets)
        self.views.copy_(other.views)


def draw_batches(plan: EpochPlan, pixels: Pixels, targets: Tensor, generator: torch.Generator) -> EpochBatches:
    """Draws the views of a plan's rows and moves the epoch to where the pixels are.

    Drawn on the CPU, whatever the device, so that every device sees the same rows and the same crops.

    Args:
        targets: of every image of ``pixels``.
    """
    device = pixels.images.device
    views = pixels.draw(int(plan.draws.max()) + 1, generator)[plan.draws].to(device)
    return EpochBatches(pixels, plan.indices.to(device), targets[plan.indices].to(device), views, plan.composition)
