"""What a method stores beside exemplars, and how the rows of an epoch find it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Stored", "StoredRows"]


@dataclass(frozen=True, eq=False)
class Stored:
    """Tensors beside stored images, as they were when each image was stored.

    Attributes:
        indices: (rows,) training images.
        tensors: (rows, width) by name. What was stored earlier may be narrower than what came later, as logits are; NaN
            fills it up.
    """

    indices: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def after(self, kept: Tensor, describe: Callable[[Tensor], Mapping[str, Tensor]]) -> Stored:
        """What is stored beside the images that are kept now: what was before, and of new images what they are given.

        Args:
            kept: (n,) training images, each once.
            describe: makes of images (m,) that are new what is stored beside them, (m, width) by name.
        """
        place = {image: row for row, image in enumerate(self.indices.tolist())}
        rows = torch.tensor([place.get(image, -1) for image in kept.tolist()], dtype=torch.long)
        new, tensors = rows < 0, {}
        for name, values in describe(kept[new]).items():
            before = self.tensors.get(name, values[:0])
            tensors[name] = values.new_full((len(kept), max(before.shape[1], values.shape[1])), torch.nan)
            tensors[name][~new, : before.shape[1]] = before[rows[~new]]
            tensors[name][new, : values.shape[1]] = values
        return Stored(kept, tensors)

    def rows(self, indices: Tensor, device: torch.device) -> StoredRows:
        """What is stored beside the images (steps, rows) of an epoch, on a device."""
        places = torch.full((int(max(indices.max(), self.indices.max())) + 1,), len(self.indices))
        places[self.indices] = torch.arange(len(self.indices))
        tables = {
            name: torch.cat([values, values.new_full((1, values.shape[1]), torch.nan)]).to(device)
            for name, values in self.tensors.items()
        }
        return StoredRows(places[indices].to(device), tables)


@dataclass(frozen=True, eq=False)
class StoredRows:
    """Where what is stored beside each row of an epoch is found; nothing is read back from the device.

    Attributes:
        places: (steps, rows), the row of each in the tables; the last one, of NaN, for images that are not stored.
        tables: (stored + 1, width) by name; the same in every epoch of a phase.
    """

    places: Tensor
    tables: Mapping[str, Tensor]

    def of(self, choose: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """What is stored beside the rows that ``choose`` takes of all: (n, width) by name."""
        rows = choose(self.places)
        return {name: table[rows] for name, table in self.tables.items()}

    def clone(self) -> StoredRows:
        """The same with places of its own."""
        return StoredRows(self.places.clone(), self.tables)

    def copy_(self, other: StoredRows) -> None:
        """Takes over the places of another epoch of the same phase, in the same memory."""
        self.places.copy_(other.places)
