"""Finds the labels of images that a training loop passes through a network, wherever they stand in the batch.

A loop hands out images with labels (a data loader, a buffer), and later passes images alone to the network: the same
tensor, a copy of it on a GPU, or several of them concatenated, shuffled or cut. A row is known again by its values.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

__all__ = ["LabelledImages", "UnknownImages", "noting_loader"]

VALUES = 1024  # of each image, at most, that go into its fingerprint


class UnknownImages(RuntimeError):
    """Images whose labels nobody has said."""


@dataclass(eq=False)
class _Batch:
    """Images (N, ...) that the loop was given, and their labels (N,)."""

    images: Tensor
    labels: Tensor
    prints: Tensor | None = field(default=None)

    def fingerprints(self) -> Tensor:
        if self.prints is None:
            self.prints = fingerprints(self.images)
        return self.prints


class LabelledImages:
    """The batches that a loop was given lately.

    Args:
        keep: batches that are kept; an image of an earlier one is unknown again.
    """

    def __init__(self, keep: int = 4) -> None:
        self._batches: deque[_Batch] = deque(maxlen=keep)

    def note(self, images: Tensor, labels: Tensor) -> None:
        """Keeps a batch: images (N, ...), labels (N,) int64."""
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images have {len(labels)} labels")
        if not any(batch.images is images and batch.labels is labels for batch in self._batches):
            self._batches.append(_Batch(images, labels))

    def note_parts(self, parts: Any) -> None:
        """Keeps what a loader or buffer hands out, where it has images and, somewhere behind the first, labels."""
        if not isinstance(parts, tuple | list):
            return
        tensors = [part for part in parts if isinstance(part, Tensor)]
        images = [tensor for tensor in tensors if tensor.dim() >= 3]
        first = next((place for place, tensor in enumerate(tensors) if tensor.dim() >= 3), len(tensors))
        labels = next((tensor for tensor in tensors[first:] if tensor.dim() == 1 and tensor.dtype == torch.long), None)
        for tensor in images:
            if labels is not None and len(tensor) == len(labels):
                self.note(tensor, labels)

    def forget(self) -> None:
        """Keeps nothing."""
        self._batches.clear()

    def labels_of(self, images: Tensor) -> Tensor:
        """The label of each image (N, ...), int64 (N,) on the CPU; a copy on the GPU is waited for.

        Raises:
            UnknownImages: some of them were in none of the batches.
            ValueError: an image was handed out under two labels.
        """
        for batch in reversed(self._batches):
            if batch.images is images:
                return batch.labels.cpu()
        sought = fingerprints(images)
        known = torch.cat([torch.empty(0, dtype=torch.long), *(batch.fingerprints() for batch in self._batches)])
        labels = torch.cat([torch.empty(0, dtype=torch.long), *(batch.labels.cpu() for batch in self._batches)])
        known, order = known.sort(stable=True)
        labels = labels[order]
        places = torch.searchsorted(known, sought).clamp(max=max(len(known) - 1, 0))
        unknown = len(sought) if not len(known) else int((known[places] != sought).sum())
        if unknown:
            raise UnknownImages(f"{unknown} of {len(sought)} rows are images that no batch held")
        doubtful = known[1:][(known[1:] == known[:-1]) & (labels[1:] != labels[:-1])]
        if torch.isin(sought, doubtful).any():
            raise ValueError("the loop was given the same image under two labels, so its task can't be told")
        return labels[places]


def fingerprints(images: Tensor) -> Tensor:
    """A number for each image (N, ...), int64 (N,) on the CPU: equal where the images are, on whatever device."""
    rows = images.detach().flatten(1)
    rows = rows[:, :: -(-rows.shape[1] // VALUES)]
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]
    # Integers, whose sum is the same in any order and on any device; an overflow wraps.
    return (rows.contiguous().view(whole).long() * _factors(rows.shape[1], rows.device)).sum(1).cpu()


@functools.lru_cache(maxsize=8)
def _factors(count: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(-(2**62), 2**62, (count,), generator=generator) | 1).to(device)


def noting_loader(images: LabelledImages) -> type[DataLoader[Any]]:
    """A ``DataLoader`` that tells ``images`` of each batch before it hands it out."""

    class NotingLoader(DataLoader[Any]):
        def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
            for batch in super().__iter__():
                images.note_parts(batch)
                yield batch

    return NotingLoader
