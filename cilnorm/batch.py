"""The vocabulary: what a batch is made of, where a run stands, and how a layer is told.

``current`` and ``past`` are rows of a batch; ``new``, ``old`` and ``seen`` are classes. Rows are ordered current first.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["Batch", "Composition", "CompositionAware", "Task", "set_composition"]


@dataclass(frozen=True)
class Composition:
    """How many leading rows of a batch come from the current task and how many from past ones.

    Attributes:
        current: rows of the current task; they come first.
        past: rows of earlier tasks; 0 where a batch holds none, or where it has no current/past cut.
        task: tasks learned before this one (0 for the first).

    Raises:
        ValueError: a negative count, an empty batch, or past rows before anything was learned.
    """

    current: int
    past: int
    task: int

    def __post_init__(self) -> None:
        if self.current < 0 or self.past < 0 or self.task < 0:
            raise ValueError(f"counts can't be negative: {self}")
        if not self.rows:
            raise ValueError(f"a batch needs at least one row: {self}")
        if self.past and not self.task:
            raise ValueError(f"past rows in the first task: {self}")

    @property
    def rows(self) -> int:
        """Rows of the whole batch."""
        return self.current + self.past


@dataclass(frozen=True)
class Task:
    """One task of a sequence; classes are numbered in the order in which they are learned.

    Attributes:
        index: tasks learned before this one.
        sizes: classes of every task of the sequence.
    """

    index: int
    sizes: tuple[int, ...]

    @property
    def old(self) -> int:
        """Classes learned before this task."""
        return sum(self.sizes[: self.index])

    @property
    def new(self) -> int:
        """Classes that this task brings."""
        return self.sizes[self.index]

    @property
    def seen(self) -> int:
        """Classes known once this task is learned."""
        return self.old + self.new

    def classes(self, index: int) -> slice:
        """The columns of the logits that belong to task ``index``."""
        start = sum(self.sizes[:index])
        return slice(start, start + self.sizes[index])


@dataclass(frozen=True, eq=False)
class Batch:
    """Images (N, C, H, W), targets (N,) in the order of learning, and what the rows are."""

    images: Tensor
    targets: Tensor
    composition: Composition

    @property
    def current(self) -> slice:
        """The rows of the current task."""
        return slice(0, self.composition.current)

    @property
    def past(self) -> slice:
        """The rows of past tasks."""
        return slice(self.composition.current, self.composition.rows)


class CompositionAware(nn.Module):
    """A module that wants to know what the next training batches are made of."""

    def compose(self, composition: Composition) -> None:
        """Takes what is needed from ``composition``; called outside ``forward``, so plain integers can be kept."""
        raise NotImplementedError


def set_composition(model: nn.Module, composition: Composition) -> None:
    """Tells every composition-aware module inside ``model``, as ``model.train()`` tells the mode."""
    for module in model.modules():
        if isinstance(module, CompositionAware):
            module.compose(composition)
