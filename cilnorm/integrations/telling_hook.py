"""Tells a network in somebody else's loop what its rows are, before each forward pass in training.

    hook = TellingHook("my loop", images, lambda: classes)
    hook.attach(network)                     # copies of the network, teachers too, are told as well

``images`` knows the labels of rows (``labelled_images``), ``classes`` the task of each class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cilnorm.batch import CompositionAware
from cilnorm.integrations.labelled_images import LabelledImages, UnknownImages
from cilnorm.norms import norm_factory
from cilnorm.rows_aware import RowsAware, Telling
from cilnorm.telling import tell_rows

__all__ = ["LearnedClasses", "TellingHook", "adds_to_loss", "listens"]


class LearnedClasses:
    """The classes of each task so far, by the loop's own labels.

    Attributes:
        tasks: the labels of each task, in the order in which they are learned.
    """

    def __init__(self) -> None:
        self.tasks: list[list[int]] = []
        self._task_of = self._order_of = torch.empty(0, dtype=torch.long)

    @property
    def task(self) -> int:
        """Tasks learned before the one that is being learned."""
        return len(self.tasks) - 1

    def begin(self, classes: Iterable[int]) -> None:
        """A task begins that brings these classes.

        Raises:
            ValueError: it brings none, or one that an earlier task had: then a label does not say the task of a row.
        """
        new, old = sorted(set(classes)), {label for task in self.tasks for label in task}
        if again := sorted(old & set(new)):
            raise ValueError(
                f"task {len(self.tasks)} brings class {again[0]} again, so a label does not say the task of a row; "
                "domain-incremental streams need cilnorm.rows with the task of each row"
            )
        if not new or new[0] < 0:
            raise ValueError(f"task {len(self.tasks)} brings the classes {new}; labels count from 0")
        self.tasks.append(new)
        every = [label for task in self.tasks for label in task]
        self._task_of = torch.full((max(every) + 1,), -1)
        self._order_of = self._task_of.clone()
        for index, task in enumerate(self.tasks):
            self._task_of[task] = index
        self._order_of[every] = torch.arange(len(every))

    def of(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The task of each label (N,), and its place in the order of learning; both int64 (N,).

        Raises:
            ValueError: a label of no task so far.
        """
        inside = (labels >= 0) & (labels < len(self._task_of))
        tasks = torch.where(inside, self._task_of[labels * inside], -1) if len(self._task_of) else labels * 0 - 1
        if (tasks < 0).any():
            raise ValueError(f"label {int(labels[tasks < 0][0])} is of none of the {len(self.tasks)} tasks so far")
        return tasks, self._order_of[labels]


class TellingHook:
    """Hooks that tell a network its rows before a forward pass in training, and end the telling after it.

    Args:
        loop: name of the framework, for messages.
        images: knows the label of each row.
        classes: gives the classes of the tasks so far.
        alone: what to set so that one device holds the network, for whoever asks for several.
        add_terms: takes what norms want added to the loss, by name; None where the loop has no place for it.

    Attributes:
        last: what was told last: whether each row (N,) is past, on the CPU.
    """

    def __init__(
        self,
        loop: str,
        images: LabelledImages,
        classes: Callable[[], LearnedClasses],
        *,
        alone: str = "use one device",
        add_terms: Callable[[dict[str, Tensor]], None] | None = None,
    ) -> None:
        self.loop, self.images, self.classes, self.alone, self.add_terms = loop, images, classes, alone, add_terms
        self.last: Tensor | None = None
        self._open: list[Telling | None] = []

    def attach(self, module: nn.Module) -> None:
        """Watches a network that takes images; once, and only if one of its layers needs telling."""
        if self not in module._forward_pre_hooks.values() and any(map(listens, module.modules())):
            module.register_forward_pre_hook(self, prepend=True, with_kwargs=True)
            module.register_forward_hook(self._end, always_call=True)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward pass of ``module``.

        Raises:
            RuntimeError: images whose labels are not known, or a replica of ``nn.DataParallel``.
            ValueError: a label of no task so far.
        """
        self._open.append(None)
        if not any(layer.training for layer in module.modules() if listens(layer)):
            return
        if getattr(module, "_is_replica", False):
            raise RuntimeError(f"nn.DataParallel cuts a batch without saying which rows go where; {self.alone}")
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        try:
            labels = self.images.labels_of(x)
        except UnknownImages as error:
            raise RuntimeError(
                f"{self.loop} trains the network on images whose labels are not known ({error}), so nobody can say "
                "which rows are past; methods that change images after they were loaded can't use this norm"
            ) from error
        classes = self.classes()
        tasks, order = classes.of(labels)
        self.last = tasks < classes.task
        self._open[-1] = tell_rows(module, past=self.last, task=classes.task, tasks=tasks, labels=order)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        telling = self._open.pop()
        if telling is None:
            return
        terms = telling.take_terms()
        telling.close()
        if terms and self.add_terms is None:
            raise RuntimeError(f"{self.loop} has no place for what the norm adds to the loss: {', '.join(terms)}")
        if terms and self.add_terms is not None:
            self.add_terms(terms)

    def __deepcopy__(self, memo: dict[int, Any]) -> TellingHook:
        return self  # a copy of the network, a teacher say, gets its images from the same loop

    def __reduce__(self) -> tuple[Any, ...]:
        return _Silence, ()


class _Silence:
    """What a hook becomes in a file: it says nothing, so that training raises until somebody tells again."""

    def __call__(self, *_: Any) -> None:
        return None

    _end = __call__


def listens(module: nn.Module) -> bool:
    """Whether a module must be told what a batch is made of."""
    return isinstance(module, RowsAware | CompositionAware)


def adds_to_loss(norm: str, options: dict[str, Any]) -> list[str]:
    """The names of what a norm adds to the loss, seen by a forward pass of one layer over two tasks.

    Raises:
        UnknownName: no norm of that name.
        TypeError: an option that the norm has not.
    """
    layer = norm_factory(norm, **options)(8)
    if not listens(layer):
        return []
    tasks = torch.tensor([0, 0, 1, 1])
    told = tell_rows(layer, tasks=tasks, past=tasks < 1, task=1, labels=tasks)
    layer(torch.linspace(0, 1, 128).view(4, 8, 2, 2))  # no random numbers, for the loop counts on its own
    return list(told.take_terms())
