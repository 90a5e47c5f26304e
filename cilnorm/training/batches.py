"""The batches of a planned epoch: what is drawn goes to the device at once, pixels are touched step by step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from cilnorm.batch import Batch, Composition
from cilnorm.training.epoch_plan import EpochPlan
from cilnorm.training.pixels import Pixels, Views
from cilnorm.training.ranks import ALONE, Ranks
from cilnorm.training.shares import SharedBatch
from cilnorm.training.stored import Stored, StoredRows

__all__ = ["EpochBatches", "draw_batches"]


@dataclass(frozen=True, eq=False)
class EpochBatches:
    """An epoch's batches, none of them made yet.

    Attributes:
        pixels: the images.
        indices: (steps, rows), on the device, or on the CPU if the images are streamed.
        targets: (steps, rows), on the device.
        views: how each image is looked at, (steps, rows), there too.
        composition: of every full batch.
        compositions: of each batch, where they may differ; a shorter one is the first rows of its line.
        stored: what a method stores beside the rows' images, if anything.
        staged: (rows, 3, H, W) uint8, if the images are streamed and this epoch is a copy for a captured step: the
            next step's images, which lie at one address so.
        ranks: the processes that share the epoch; where there are several, batches are this one's rows.
    """

    pixels: Pixels
    indices: Tensor
    targets: Tensor
    views: Views
    composition: Composition
    compositions: tuple[Composition, ...] = ()
    stored: StoredRows | None = None
    staged: Tensor | None = None
    ranks: Ranks = ALONE

    @property
    def full(self) -> int:
        """Leading batches that have all rows."""
        short = self.compositions and self.compositions[-1].rows < self.indices.shape[1]
        return len(self) - bool(short)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def batches(self, first: int = 0) -> Iterator[Batch]:
        """The batches from step ``first`` on; streamed images are read while the batch before them is used."""
        parts = [self._own(self.indices[step], self._told(step)) for step in range(first, len(self))]
        for step, images in enumerate(self.pixels.read(parts), first):
            yield self._batch(step, images)

    def batch(self, step: int | Tensor) -> Batch:
        """A step's batch, augmented.

        Args:
            step: its number; or a tensor (1,) on the device that holds that of a full batch and is not read back from
                there, so that the batch has the composition of every full one.
        """
        if self.staged is not None:
            return self._batch(step, self.staged)
        return self._batch(step, self.pixels.images[self._own(_row(self.indices, step), self._told(step))])

    def _batch(self, step: int | Tensor, images: Tensor) -> Batch:
        composition = self._told(step)

        def rows(plan: Tensor) -> Tensor:
            return _row(plan, step)[: composition.rows]

        stored = self.stored.of(rows) if self.stored else {}
        if self.ranks.alone or not self.ranks.can_share(composition):
            return Batch(self.pixels.seen(images, self.views.each(rows)), rows(self.targets), composition, stored)
        seen = self.pixels.seen(images, self.views.each(lambda plan: self._own(_row(plan, step), composition)))
        nowhere = torch.empty(composition.rows, *seen.shape[1:], dtype=seen.dtype, device="meta")
        whole = Batch(nowhere, rows(self.targets), composition, stored)
        own = self._own(whole.targets, composition), self.ranks.composition(composition)
        own_stored = {name: self._own(rows, composition) for name, rows in stored.items()}
        return SharedBatch(seen, *own, own_stored, whole, not self.ranks.evenly(composition), self.ranks.mean)

    def _own(self, row: Tensor, composition: Composition) -> Tensor:
        """What this process looks at of a line of the plan."""
        if self.ranks.alone or not self.ranks.can_share(composition):
            return row[: composition.rows]
        return row[self.ranks.rows(composition).to(row.device)]

    def _told(self, step: int | Tensor) -> Composition:
        known = self.compositions and not isinstance(step, Tensor)
        return self.compositions[int(step)] if known else self.composition

    def clone(self) -> EpochBatches:
        """The same epoch in memory of its own; the pixels are shared, but for the first step's where streamed."""
        views = self.views.each(torch.clone)
        staged = self.pixels.images[self.indices[0]].clone() if self.pixels.streamed else None
        rows, targets = self.indices.clone(), self.targets.clone()
        stored = self.stored and self.stored.clone()
        return EpochBatches(self.pixels, rows, targets, views, self.composition, stored=stored, staged=staged)

    def copy_(self, other: EpochBatches) -> None:
        """Takes over another epoch of as many steps and rows, in the same memory."""
        self.indices.copy_(other.indices)
        self.targets.copy_(other.targets)
        self.views.copy_(other.views)
        if self.stored and other.stored:
            self.stored.copy_(other.stored)

    def stage(self, other: EpochBatches, first: int) -> Iterator[None]:
        """Step after step of another epoch's full batches, from ``first`` on: where images are streamed, those of the
        step are put into ``staged``; where they are not, nothing is to be done."""
        if self.staged is None:
            yield from repeat(None, max(other.full - first, 0))
        else:
            for _ in self.pixels.read(other.indices[first : other.full].unbind(), self.staged):
                yield


def _row(plan: Tensor, step: int | Tensor) -> Tensor:
    return plan.index_select(0, step)[0] if isinstance(step, Tensor) else plan[step]


def draw_batches(
    plan: EpochPlan,
    pixels: Pixels,
    targets: Tensor,
    generator: torch.Generator,
    stored: Stored | None = None,
    ranks: Ranks = ALONE,
) -> EpochBatches:
    """Draws the views of a plan's rows and moves the epoch to where the pixels are.

    Drawn on the CPU, whatever the device, so that every device sees the same rows and the same crops.

    Args:
        targets: of every image of ``pixels``.
        stored: what a method stores beside some of them.
        ranks: the processes that share the rows of each batch.
    """
    device = pixels.device
    views = pixels.draw(int(plan.draws.max()) + 1, generator)[plan.draws].to(device)
    indices = plan.indices if pixels.streamed else plan.indices.to(device)
    told = plan.composition, plan.compositions
    beside = stored.rows(plan.indices, device) if stored and stored.tensors else None
    return EpochBatches(pixels, indices, targets[plan.indices].to(device), views, *told, beside, ranks=ranks)
