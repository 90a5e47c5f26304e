"""Which process takes what, where several share a run: rows of a batch, and images that are looked at one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from cilnorm.batch import Batch, Composition
from cilnorm.training.place import Place
from cilnorm.values import SpecError

__all__ = ["SharedBatch", "Shares"]

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class SharedBatch(Batch):
    """A process's rows of a batch.

    Attributes:
        whole: targets and composition of all rows. Its images can't be looked at, since no process has them.
        uneven: whether processes hold other numbers of current rows, so that layers must be told of each row.
        average: gives the mean of the processes' values.
    """

    whole: Batch | None = None
    uneven: bool = False
    average: Callable[[Tensor], Tensor] = lambda value: value

    def mean(self, value: Tensor) -> Tensor:
        """Of a mean over this process's rows, that over the rows of all."""
        return self.average(value)


@dataclass(frozen=True, eq=False)
class Shares:
    """The parts of the process in a place, among as many as there are.

    Attributes:
        place: of the process.
    """

    place: Place = Place()  # noqa: RUF009  (frozen)

    @property
    def size(self) -> int:
        """How many there are."""
        return self.place.size

    @property
    def alone(self) -> bool:
        """Whether there is only one."""
        return self.size == 1

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.place.leads

    def share(self, indices: Tensor) -> Tensor:
        """This process's part of indices (n,): as many in each, the last one again and again where they run out."""
        if self.alone or not len(indices):
            return indices
        count = -(-len(indices) // self.size)
        own = torch.arange(count) + self.place.index * count
        return indices[own.clamp(max=len(indices) - 1)]

    def every(self, batches: Sequence[T]) -> Sequence[T]:
        """This process's part of batches that are looked at one by one: every N-th."""
        return batches[self.place.index :: self.size]

    def refuse(self, composition: Composition) -> None:
        """Raises ValueError where the rows of a batch can't be shared equally; the message says what could."""
        counts = composition.current, composition.past
        if all(count % self.size == 0 for count in counts):
            return
        able = [n for n in range(1, sum(counts) + 1) if not any(count % n for count in counts)]
        near = [max(round(count / self.size), 1) * self.size if count else 0 for count in counts]
        what = f"{counts[0]} current and {counts[1]} past rows" if counts[1] else f"{counts[0]} rows"
        raise ValueError(
            f"{self.size} processes can't share {what} equally; {', '.join(map(str, able))} can, or with "
            f"{self.size} take {' and '.join(str(count) for count in near if count)} rows, which is another experiment"
        )

    def refuse_rows(self, rows: tuple[int, int], mixed: bool) -> None:
        """Raises SpecError where a spec's rows, current and past ones if ``mixed``, can't be shared equally."""
        kinds = Composition(*rows, 1) if mixed else Composition.of_one_kind(sum(rows), 0)
        try:
            self.refuse(kinds)
        except ValueError as error:
            raise SpecError(f"rows {rows[0]}:{rows[1]}: {error}") from error

    def evenly(self, whole: Composition) -> bool:
        """Whether every process gets as many current and as many past rows of a batch as any other."""
        return whole.current % self.size == 0 and whole.past % self.size == 0

    def can_share(self, whole: Composition) -> bool:
        """Whether every process gets as many rows of a batch as any other; if not, each takes all of them by itself.

        Only the last of shuffled batches, which holds what is left, can be such a batch.
        """
        return whole.rows % self.size == 0

    def composition(self, whole: Composition) -> Composition:
        """Of this process's rows of a batch."""
        count = whole.rows // self.size
        current = whole.current // self.size
        if not self.evenly(whole):
            current = min(max(whole.current - self.place.index * count, 0), count)
        return Composition(current, count - current, whole.task, whole.classes)

    def rows(self, whole: Composition) -> Tensor:
        """Which rows of a batch are this process's: its part of the current ones, then of the past ones.

        Where they don't divide, processes take the rows in order, so that a first one may have current ones alone.
        """
        own, at = self.composition(whole), self.place.index
        if not self.evenly(whole):
            return torch.arange(own.rows) + at * own.rows
        current = torch.arange(own.current) + at * own.current
        return torch.cat([current, torch.arange(own.past) + whole.current + at * own.past])
