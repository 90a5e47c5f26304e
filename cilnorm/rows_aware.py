"""What is known about each row of one batch, and layers that may be told of it.

``Composition`` says how many leading rows are current and lasts until another one is told. ``Rows`` are of one batch:
of every row they say whether it is past, and where asked its task and label. ``cilnorm.telling`` tells them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cilnorm.batch import Composition

__all__ = ["KEPT", "Rows", "RowsAware", "Telling", "Told", "recomputing"]

KEPT = 4  # tellings that a layer keeps for repeated passes; as many forwards may lie before one backward


def recomputing() -> bool:
    """Whether this forward pass repeats an earlier one because activation checkpointing threw its results away.

    Averages must not move a second time then. Such a pass runs inside a backward pass, and torch numbers those.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one batch, in any order.

    Attributes:
        past: (N,) bool, whether a row is of a task before this one.
        task: tasks learned before this one (0 for the first).
        tasks: (N,) int64, the task of each row; None where nobody said.
        labels: (N,) int64, the class of each row; None where nobody said.
        composition: the counts, where rows stand current first and that is known without waiting for a device.
        classes: old and new classes, for layers that count those in the place of tasks; None where nobody said.
        shared: what layers made of all this, so that equal layers make it once.
    """

    past: Tensor
    task: int
    tasks: Tensor | None = None
    labels: Tensor | None = None
    composition: Composition | None = None
    classes: tuple[int, int] | None = None
    shared: dict[Any, Any] = field(default_factory=dict, repr=False)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` returns, called once a key."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def to(self, device: torch.device) -> Rows:
        """The same rows on a device; nothing there is waited for."""
        if self.past.device == device:
            return self
        moved = [value if value is None else value.to(device, non_blocking=True) for value in self._tensors()]
        return Rows(moved[0], self.task, moved[1], moved[2], self.composition, self.classes)  # type: ignore[arg-type]

    def _tensors(self) -> tuple[Tensor | None, ...]:
        return self.past, self.tasks, self.labels

    def __deepcopy__(self, memo: dict[int, Any]) -> Rows:
        return self


class Telling:
    """Rows that were told, until they are used up; layers put what they want added to the loss here.

    Attributes:
        rows: what was told.
        repeat: whether a layer may use it more than once.
        open: whether it may still be used.
        count: how many rows there are.
    """

    def __init__(self, rows: Rows, repeat: bool = False) -> None:
        self.rows, self.repeat, self.open = rows, repeat, True
        self.count = len(rows.past)  # asked once: a tensor takes its time to answer, and there are many layers
        self.taken = [False]  # shared with whoever must know later whether anybody asked for the terms
        self._terms: dict[str, list[Tensor]] = {}

    def close(self) -> None:
        """Ends it: a training pass that needs it raises from now on."""
        self.open = False
        self._terms = {}

    def add_term(self, name: str, value: Tensor) -> None:
        """Adds a layer's term of the loss to what other layers gave under that name."""
        # Summed when they are taken: compiled code must not have an earlier pass's term for an input.
        self._terms.setdefault(name, []).append(value)

    def take_terms(self) -> dict[str, Tensor]:
        """What the layers of the last forward pass want added to the loss, by name; they are handed out once."""
        terms, self._terms, self.taken[0] = self._terms, {}, True
        return {name: torch.stack(values).sum() for name, values in terms.items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> Telling:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _ended, ()


def _ended() -> Telling:
    """What becomes of a telling in a file: one that is over."""
    telling = Telling(Rows(torch.empty(0, dtype=torch.bool), 0))
    telling.close()
    return telling


@dataclass(eq=False)
class Told:
    """A telling as one layer holds it.

    Attributes:
        telling: what was told.
        rows: the rows of it, on the layer's device.
        reduced: what the layer made of its rows.
        count: how many there are; compiled code reads this and not ``rows``, all of whose fields would then be part of
            what it was compiled for in torch 2.6.
        mark: one value of each row (N,) that the layer was given, by which a repeated pass finds its telling again.
        kept: whatever the layer needs to repeat the pass as it was.
    """

    telling: Telling
    rows: Rows
    reduced: Any
    count: int
    mark: Tensor | None = None
    kept: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Told:
        return copy.copy(self)


class RowsAware(nn.Module):
    """A module that takes the rows of a batch in any order.

    What it is told is for one batch: the first training pass uses it up, and the next one without another telling
    raises. A pass that activation checkpointing repeats finds the telling of the pass that it repeats; where several
    of the same size come into question it compares its input with theirs, and on a GPU waits for that.

    Attributes:
        needs_rows: whether a composition is not enough to train it.
    """

    needs_rows: ClassVar[bool] = False
    _told: Told | None = None
    _earlier: tuple[Told, ...] = ()

    def reduce(self, rows: Rows) -> Any:
        """What the layer will compute with; called when it is told, outside ``forward``.

        Raises:
            ValueError: something that this layer needs was not told.
        """
        return rows

    def receive(self, telling: Telling, rows: Rows) -> None:
        """Takes a telling in the place of any other; ``rows`` are its rows on this module's device."""
        # Past nn.Module's own way of setting an attribute, which takes longer than all else here.
        self.__dict__["_told"] = Told(telling, rows, self.reduce(rows), telling.count)

    def forget(self) -> None:
        """Knows nothing of any batch, as when it was new."""
        self._told, self._earlier = None, ()

    def take(self, x: Tensor) -> Told:
        """The telling for a training pass over ``x`` (N, C, H, W), used up by it.

        Raises:
            RuntimeError: nothing was told, or what was told is used up or has ended.
            ValueError: another number of rows was told.
        """
        if recomputing():
            return self._again(x)
        told = self._told
        if told is None or not told.telling.open:
            raise RuntimeError(f"{self._amiss()}; {ADVICE}")
        if told.count != x.shape[0]:
            raise ValueError(f"{told.count} rows were described, the batch has {x.shape[0]}")
        if not told.telling.repeat:
            self._told = None
        if torch.compiler.is_compiling():
            return told
        used = Told(told.telling, told.rows, told.reduced, told.count, _mark(x))
        self._earlier = (*self._earlier[1 - KEPT :], used)
        return used

    def _amiss(self) -> str:
        if self._told is not None:
            return "what was told of the rows ended with its `with` block"
        if self._earlier:
            return "what was told of the rows was of one batch, and is used up"
        return "the layer does not know what the batch is made of"

    def _again(self, x: Tensor) -> Told:
        """The telling of the pass that this one repeats."""
        candidates = [told for told in self._earlier if len(told.rows.past) == x.shape[0]]
        if len(candidates) > 1:
            mark = _mark(x)
            candidates = [told for told in candidates if told.mark is not None and torch.equal(told.mark, mark)]
        if not candidates:
            raise RuntimeError(
                "activation checkpointing repeats a pass whose rows were forgotten; "
                f"at most {KEPT} batches may be told between a forward and its backward pass"
            )
        return candidates[-1]


ADVICE = (
    "call cilnorm.set_composition(model, composition) where rows stand current first, or train inside "
    "`with cilnorm.rows(model, past=..., task=...)`"
)


def _mark(x: Tensor) -> Tensor:
    """A value of every row, from the middle of its first channel, (N,)."""
    return x.detach()[:, 0, x.shape[2] // 2, x.shape[3] // 2].clone()
