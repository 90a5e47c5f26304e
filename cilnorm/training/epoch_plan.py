"""Which images stand in which rows of an epoch's batches, laid out before the epoch starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cilnorm.batch import Composition, Task
from cilnorm.method import Rows
from cilnorm.training.protocol import Protocol
from cilnorm.training.randomness import generator

__all__ = [
    "EpochPlan",
    "NoBatch",
    "RowSource",
    "VaryingComposition",
    "VaryingRows",
    "draw_pool",
    "phase_sources",
    "plan_epoch",
]


class NoBatch(ValueError):
    """There are too few images to fill one batch; the message says how many there are."""


class VaryingRows(RuntimeError):
    """Something asked how many rows are current where that differs from batch to batch."""


class VaryingComposition(Composition):
    """Of full batches that agree in nothing but their size; whoever asks for their numbers of rows gets an error.

    What a captured step is told, since one graph serves all of them.
    """

    def __init__(self, rows: int, task: int, classes: tuple[int, int] | None) -> None:
        for name, value in (("_rows", rows), ("task", task), ("classes", classes)):
            object.__setattr__(self, name, value)

    @property
    def rows(self) -> int:
        return int(self._rows)  # type: ignore[attr-defined]

    @property
    def current(self) -> int:
        raise VaryingRows("shuffled batches differ in how many rows are current")

    past = current

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VaryingComposition) and self._facts() == other._facts()

    def __hash__(self) -> int:
        return hash(self._facts())

    def __repr__(self) -> str:
        return f"VaryingComposition{self._facts()}"

    def _facts(self) -> tuple[object, ...]:
        return self.rows, self.task, self.classes


@dataclass(frozen=True, eq=False)
class RowSource:
    """Images that fill ``rows`` rows of every batch; ``name`` is their stream of randomness.

    Attributes:
        current: the first so many images of the pool are the current task's, the others stored ones; None where the
            rows have no such cut.
    """

    pool: Tensor
    rows: int
    name: str
    current: int | None = None


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """An epoch laid out before it starts.

    Attributes:
        indices: (steps, rows) training images, current rows first.
        draws: (steps, rows) which augmentation draw each row uses; a replayed row repeats its number.
        composition: of every full batch; a ``VaryingComposition`` where they differ.
        compositions: of each batch, where they may differ. A shorter batch is the first rows of its line, and what
            stands behind them is filler.
    """

    indices: Tensor
    draws: Tensor
    composition: Composition
    compositions: tuple[Composition, ...] = ()

    @property
    def steps(self) -> int:
        """Batches in the epoch."""
        return len(self.indices)


def draw_pool(rows: Rows, current: Tensor, stored: Tensor, protocol: Protocol, stream: torch.Generator) -> Tensor:
    """The images that the first rows of a phase's batches are drawn from, but for ``balanced`` and ``seen`` ones.

    Args:
        rows: as ``Phase.rows`` says.
        current, stored: images of the task, and of the memory; indices.
        stream: draws the current images of ``even`` rows.
    """
    if rows == "even":
        order = torch.randperm(len(current), generator=stream)
        return torch.cat([stored, current[order[: len(stored)]]])
    united = protocol.current_rows == "union" or protocol.batches == "shuffled"
    return torch.cat([current, *[stored] * (2 if rows == "doubled" else int(united))])


def phase_sources(
    rows: Rows, pool: Tensor, images: tuple[int, Tensor], wanted: tuple[int, int], task: Task, protocol: Protocol
) -> tuple[list[RowSource], Composition]:
    """Where the rows of a phase's batches come from: current beside past ones, or rows of one kind without that cut.

    Without a memory every row is a current one.

    Args:
        pool: what the first rows are drawn from.
        images: how many the task has, and those of the memory.
        wanted: current and past rows of a mixed batch.
        task: the one at hand.
    """
    (current, past), (own, stored) = wanted, images
    classes = task.old, task.new
    mixed = rows in ("mixed", "doubled") and task.index and len(stored)
    if mixed and protocol.batches == "shuffled":
        return [RowSource(pool, current + past, "union", own)], VaryingComposition(current + past, task.index, classes)
    if mixed:
        sources = [RowSource(pool, current, "current"), RowSource(stored, past, "past")]
        return sources, Composition(current, past, task.index, classes)
    return [RowSource(pool, current + past, rows)], Composition.of_one_kind(current + past, task.index, classes)


def plan_epoch(
    sources: Sequence[RowSource],
    composition: Composition,
    protocol: Protocol,
    seed: int,
    position: tuple[int, int],
    epoch: int,
) -> EpochPlan:
    """Lays out an epoch; a function of its arguments alone, so a resumed run continues where it was.

    Args:
        sources: the first one decides how long an epoch of ``passes`` is.
        position: task and phase, which name the streams together with each source's name.
        epoch: counted from 0 within the phase.

    Raises:
        NoBatch: the epoch would hold no full batch.
    """
    images = [len(source.pool) for source in sources]
    if protocol.batches == "shuffled" and all(images):
        return _one_pass(sources[0], composition, seed, (*position, epoch))
    indices = draws = torch.empty(0, composition.rows, dtype=torch.long)
    if protocol.epoch == "cycle":
        indices, draws = _cycle(sources, protocol.drop_last, seed, (*position, epoch))
    elif all(images):
        steps = -(-len(sources[0].pool) // sources[0].rows)
        columns = [_endless(source, epoch * steps, steps, seed, position) for source in sources]
        indices = torch.cat(columns, dim=1)
        draws = torch.arange(indices.numel()).view_as(indices)
    if not len(indices):
        raise NoBatch(f"no batch of {composition.rows} rows can be filled from {images} images")
    return EpochPlan(indices, draws, composition)


def _shuffled(source: RowSource, seed: int, position: tuple[int, ...]) -> Tensor:
    return torch.randperm(len(source.pool), generator=generator(seed, f"rows/{source.name}", *position))


def _one_pass(source: RowSource, composition: Composition, seed: int, position: tuple[int, ...]) -> EpochPlan:
    """One shuffled pass over the pool in batches, current rows first in each; the last batch holds what is left."""
    order = _shuffled(source, seed, position)
    indices, draws, compositions = [], [], []
    own = len(order) if source.current is None else source.current
    for part, drawn in zip(order.split(source.rows), torch.arange(len(order)).split(source.rows), strict=True):
        sort = (part >= own).to(torch.uint8).argsort(stable=True)
        filler = torch.zeros(source.rows - len(part), dtype=torch.long)
        indices.append(source.pool[torch.cat([part[sort], filler])])
        draws.append(torch.cat([drawn[sort], filler]))
        current = int((part < own).sum())
        compositions.append(Composition(current, len(part) - current, composition.task, composition.classes))
    full = {each for each in compositions if each.rows == source.rows} or set(compositions)
    varying = VaryingComposition(source.rows, composition.task, composition.classes)
    same = full.pop() if len(full) == 1 else varying
    return EpochPlan(torch.stack(indices), torch.stack(draws), same, tuple(compositions))


def _endless(source: RowSource, step: int, steps: int, seed: int, position: tuple[int, int]) -> Tensor:
    """Steps [step, step + steps) of an endless sequence of shuffled passes over the pool, (steps, rows)."""
    size, first, count = len(source.pool), step * source.rows, steps * source.rows
    passes = range(first // size, (first + count - 1) // size + 1)
    order = torch.cat([_shuffled(source, seed, (*position, number)) for number in passes])
    start = first - passes[0] * size
    return source.pool[order[start : start + count]].view(steps, source.rows)


def _cycle(
    sources: Sequence[RowSource], drop_last: bool, seed: int, position: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """The released code's epoch: loaders side by side, the shorter replayed, batches of another size skipped."""
    loaders: list[list[tuple[Tensor, Tensor]]] = []
    offset = 0
    for source in sources:
        order = _shuffled(source, seed, position)
        draws = torch.arange(offset, offset + len(order))
        batches = list(zip(source.pool[order].split(source.rows), draws.split(source.rows), strict=True))
        if drop_last and len(batches[-1][0]) < source.rows:
            batches.pop()
        loaders.append(batches)
        offset += len(order)
    rows = sum(source.rows for source in sources)
    steps = []
    for step in range(max(map(len, loaders)) if all(loaders) else 0):
        drawn = [batches[step % len(batches)] for batches in loaders]
        if sum(len(indices) for indices, _ in drawn) == rows:
            steps.append((torch.cat([i for i, _ in drawn]), torch.cat([d for _, d in drawn])))
    empty = torch.empty(0, rows, dtype=torch.long)
    return (torch.stack([i for i, _ in steps]), torch.stack([d for _, d in steps])) if steps else (empty, empty)
