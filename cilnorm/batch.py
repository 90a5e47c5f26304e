"""The vocabulary: what a batch is made of, where a run stands, and how a layer is told.

``current`` and ``past`` are rows of a batch; ``new``, ``old`` and ``seen`` are classes. Rows are ordered current first.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

__all__ = [
    "Batch",
    "Composition",
    "CompositionAware",
    "CompositionWarning",
    "Role",
    "Task",
    "modules_within",
    "set_composition",
]

Role = Literal["learning", "frozen", "idle"]


@dataclass(frozen=True)
class Composition:
    """How many leading rows of a batch come from the current task and how many from past ones.

    Attributes:
        current: rows of the current task; they come first.
        past: rows of earlier tasks; 0 where a batch holds none, or where it has no current/past cut.
        task: tasks learned before this one (0 for the first), however many classes each of them had.
        classes: old and new classes, for layers that count those in the place of tasks; None where nobody said. Two
            compositions that differ in nothing else are equal.

    Raises:
        ValueError: a negative count, an empty batch, or past rows before anything was learned.
    """

    current: int
    past: int
    task: int
    classes: tuple[int, int] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.current < 0 or self.past < 0 or self.task < 0:
            raise ValueError(f"counts can't be negative: {self}")
        if not self.rows:
            raise ValueError(f"a batch needs at least one row: {self}")
        if self.past and not self.task:
            raise ValueError(f"past rows in the first task: {self}")

    @classmethod
    def of_one_kind(cls, rows: int, task: int, classes: tuple[int, int] | None = None) -> Composition:
        """A batch without a cut between current and past rows: of the first task, or balanced over all classes."""
        return cls(rows, 0, task, classes)

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
        images: what the task is trained on: the number of images of each seen class, stored ones of old classes; empty
            where nobody counted.
    """

    index: int
    sizes: tuple[int, ...]
    images: tuple[int, ...] = ()

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

    def of(self, targets: Tensor) -> Tensor:
        """The task that each label (N,) belongs to, counted from 0, int64; no device is waited for."""
        return torch.bucketize(targets, _ends(self.sizes, targets.device), right=True)


@functools.lru_cache(maxsize=16)
def _ends(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """The first label after each task, kept on the device so that a captured step can read it."""
    return torch.tensor(list(itertools.accumulate(sizes)), device=device)


@dataclass(frozen=True, eq=False)
class Batch:
    """Images (N, C, H, W), targets (N,) in the order of learning, and what the rows are.

    Attributes:
        stored: what the method stored beside each row's image, (N, width) by name; NaN where an image is not stored,
            or was when there was less to say.
    """

    images: Tensor
    targets: Tensor
    composition: Composition
    stored: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def current(self) -> slice:
        """The rows of the current task."""
        return slice(0, self.composition.current)

    @property
    def past(self) -> slice:
        """The rows of past tasks."""
        return slice(self.composition.current, self.composition.rows)

    def mean(self, value: Tensor) -> Tensor:
        """Of a mean over these rows, that over all rows of the batch, of which another process may hold a part."""
        return value


class CompositionWarning(UserWarning):
    """Training goes on, but a layer can hardly do what it is there for; the message says why and what to do."""


class CompositionAware(nn.Module):
    """A module that wants to know what the next training batches are made of.

    Attributes:
        doubt: why the module can hardly do what it is there for with what it was told last, and what to do; ``compose``
            sets it. ``set_composition`` makes a warning of it.
    """

    doubt: str | None = None

    def compose(self, composition: Composition) -> None:
        """Takes what is needed from ``composition``; called outside ``forward``, so plain integers can be kept."""
        raise NotImplementedError


def modules_within(model: nn.Module, *roles: Role) -> list[nn.Module]:
    """As ``model.modules()``, in a tenth of the time, without parts of another role than these.

    A part has a role where somebody gave it an attribute ``role``; without one it learns. What is ``frozen`` is used
    and learns no more; what is ``idle`` is not used either. See ``cilnorm.growing``.
    """
    found, waiting = {}, [model]
    while waiting:
        module = waiting.pop()
        if id(module) not in found and module.__dict__.get("role", "learning") in roles:
            found[id(module)] = module
            if module._modules:
                waiting += [child for child in reversed(module._modules.values()) if child is not None]
    return list(found.values())


def set_composition(model: nn.Module, composition: Composition, *, expect_listeners: bool = True) -> None:
    """Tells every composition-aware module inside ``model``, as ``model.train()`` tells the mode; but frozen parts.

    Args:
        expect_listeners: whether a model without such a module is worth a warning.

    Warns:
        CompositionWarning: once a model and reason: nobody listens, or a layer can't balance such batches.
    """
    listeners = [module for module in modules_within(model, "learning") if isinstance(module, CompositionAware)]
    for listener in listeners:
        listener.compose(composition)
    if expect_listeners and not listeners:
        _warn_once(
            model,
            "nobody listens",
            f"no layer of this {type(model).__name__} listens to set_composition, so it told nobody; give the model "
            'such layers first, by norm_layer=norm_factory("tbbn") or convert_norms(model, "tbbn"), and mind that '
            "convert_sync_batchnorm and the like may have replaced them",
        )
    for listener in listeners:
        if listener.doubt:
            _warn_once(model, "doubt", listener.doubt)
            break


_WARNED: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()  # of which model was said what


def _warn_once(model: nn.Module, reason: str, text: str) -> None:
    """Warns the caller's caller, unless the same was said of the model before; never in a compiled graph."""
    if torch.compiler.is_compiling():
        return
    said = _WARNED.setdefault(model, set())
    if reason not in said:
        said.add(reason)
        warnings.warn(text, CompositionWarning, stacklevel=3)
