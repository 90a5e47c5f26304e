"""The order of tasks, and in which points a run follows the paper or its released code.

``Protocol`` names every point in which the released code of TBBN (github.com/csm9493/TaskBalancedBN) differs from our
reading of the paper. The defaults (``protocol: corrected``) are that reading: where the paper is silent, what we take
for slips of the code is mended. The published values are those of the code, so tables that reproduce them run
``RELEASED``, which switches the differences on.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cilnorm.batch import Task
from cilnorm.heads import HeadStart
from cilnorm.training.randomness import generator

__all__ = ["BESIDES", "PROTOCOLS", "PYCIL", "RELEASED", "Protocol", "Stream", "class_order", "task_sizes"]


@dataclass(frozen=True)
class Protocol:
    """In what a run differs, or does not, from our reading of the paper.

    Attributes:
        batches: ``stratified``: every batch holds as many current and past rows as ``rows`` says. ``shuffled``: an
            epoch is one pass over current and stored images together, cut into batches of as many rows in all, the last
            one shorter, as PyCIL and the code of LUCIR, PODNet, AFC and DER train; in a batch current rows come first,
            and how many there are differs from batch to batch.
        current_rows: where the current rows of a batch come from: the ``task``, or the ``union`` of the task and the
            memory (the released LUCIR and EEIL).
        epoch: ``passes``: one pass over the current images in ceil(n / rows) full batches, what a pass leaves over
            opens the next epoch. ``cycle``: current and past loaders side by side as long as the longer one lasts, the
            shorter one replayed with the same batches and crops, batches of another size skipped (released).
        drop_last: in ``cycle``, leave each loader's short last batch out before replaying (the released EEIL).
        validation: part of every class' training images held out for good (released: 0.1).
        keep: weights at the end of a phase: the ``last``, or the ``best`` by loss on the current task's held-out
            images (released).
        test_images: ``all``, or only those in ``full`` batches (released: 960 of 1000 images a CIFAR-100 task).
        score: what fills the accuracy matrix: ``test`` images, or the held-out ones of ``validation``, for choices that
            must not look at test images.
        budget: exemplars a class: ``floor`` or ``ceil`` of memory / classes (released: ceil).
        herding: which images become exemplars. ``greedy`` and ``icarl``: the two forms of iCaRL's herding, see
            ``cilnorm.training.memory``; ``random``: any of a class; ``closest``: those nearest to the mean of their
            class; ``reservoir``: any of all that were met so far, so that classes have different numbers of them.
        mirrored_means: with ``classifier: nme``, whether mirror images of exemplars count where training mirrors, as in
            the code of iCaRL (PyCIL: no).
        head_start: how the weights of new classes start in a linear head. ``torch``: uniform in ±1/√dim, the bias, too;
            ``kaiming``: uniform in ±√(3/dim), the bias 0 (PyCIL).
        herd_again: rank stored exemplars anew after every task instead of cutting their lists (released).
    """

    batches: Literal["stratified", "shuffled"] = "stratified"
    current_rows: Literal["task", "union"] = "task"
    epoch: Literal["passes", "cycle"] = "passes"
    drop_last: bool = False
    validation: float = 0.0
    keep: Literal["last", "best"] = "last"
    test_images: Literal["all", "full"] = "all"
    score: Literal["test", "validation"] = "test"
    budget: Literal["floor", "ceil"] = "floor"
    herding: Literal["greedy", "icarl", "random", "closest", "reservoir"] = "greedy"
    mirrored_means: bool = True
    head_start: HeadStart = "torch"
    herd_again: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.validation < 1:
            raise ValueError(f"validation is a part of the training images in [0, 1), not {self.validation}")
        if self.keep == "best" and not self.validation:
            raise ValueError("keep: best needs held-out images; set protocol.validation, 0.1 say")
        if self.score == "validation" and not self.validation:
            raise ValueError("score: validation needs held-out images; set protocol.validation, 0.1 say")
        if self.batches == "shuffled" and self.epoch == "cycle":
            raise ValueError(
                "epoch: cycle is a rule for batches: stratified; with batches: shuffled leave it at passes"
            )


RELEASED: dict[str, Any] = {
    "epoch": "cycle",
    "validation": 0.1,
    "keep": "best",
    "test_images": "full",
    "budget": "ceil",
    "herd_again": True,
}
PYCIL: dict[str, Any] = {"batches": "shuffled", "mirrored_means": False, "head_start": "kaiming"}
PROTOCOLS: dict[str, dict[str, Any]] = {"corrected": {}, "released": RELEASED, "pycil": PYCIL}
# What belongs to a named protocol and is no field of ``Protocol``.
BESIDES: dict[str, dict[str, Any]] = {"pycil": {"rows": (96, 32), "class_order": 1993}}


def class_order(classes: int, seed: int) -> list[int]:
    """The source's labels in the order in which they are learned, as FACIL draws it."""
    order = list(range(classes))
    np.random.RandomState(seed).shuffle(order)
    return order


def task_sizes(classes: int, tasks: int, first: int | None = None, increment: int | None = None) -> tuple[int, ...]:
    """Classes of each task; where the number does not divide, the first of equal tasks bring one more.

    Args:
        tasks: how many, the first included; of no account where ``increment`` is given.
        first: classes of the first task; None for as many as the others.
        increment: classes of each later task; the last one brings what is left.

    Raises:
        ValueError: more tasks than classes, or none; a first task that leaves the others nothing.
    """
    if first is not None and first > classes:
        raise ValueError(f"a first task of {first} classes, but {classes} in all")
    if increment is not None:
        start = min(increment if first is None else first, classes)
        rest = [min(increment, classes - done) for done in range(start, classes, increment)]
        return (start, *rest)
    if not 1 <= tasks <= classes:
        raise ValueError(f"{classes} classes can't be split into {tasks} tasks")
    if first is None:
        small, larger = divmod(classes, tasks)
        return tuple(small + (index < larger) for index in range(tasks))
    if tasks == 1 and first == classes:
        return (first,)
    if classes - first < tasks - 1 or tasks == 1:
        raise ValueError(f"a first task of {first} leaves {classes - first} of {classes} classes to {tasks - 1} tasks")
    return (first, *task_sizes(classes - first, tasks - 1))


class Stream:
    """A data set as a sequence of tasks: who belongs to which, in the labels of learning.

    Args:
        train_labels, test_labels: the source's labels, int64.
        order: the source's labels in the order of learning; labels outside it are left out.
        sizes: classes of each task.
        validation: part of every class held out.
        seed: of the held-out choice, as Python's ``random`` draws it in the released code.
        train_per_class: keep only that many training images of a class, the first of a seeded shuffle.

    Attributes:
        targets, test_targets: labels in the order of learning, -1 for images that are left out.
    """

    def __init__(
        self,
        train_labels: Tensor,
        test_labels: Tensor,
        order: Sequence[int],
        sizes: tuple[int, ...],
        validation: float = 0.0,
        seed: int = 0,
        train_per_class: int | None = None,
    ) -> None:
        self.tasks = tuple(Task(index, sizes) for index in range(len(sizes)))
        learned = torch.full((int(max(train_labels.max(), test_labels.max())) + 1,), -1)
        learned[torch.tensor(order)] = torch.arange(len(order))
        self.targets, self.test_targets = learned[train_labels.cpu()], learned[test_labels.cpu()]
        if train_per_class is not None:
            self._thin(train_per_class, seed)
        self._held_out = torch.zeros(len(self.targets), dtype=torch.bool)
        if validation:
            self._hold_out(validation, random.Random(seed))

    def _thin(self, count: int, seed: int) -> None:
        for label in range(int(self.targets.max()) + 1):
            members = (self.targets == label).nonzero()[:, 0]
            shuffled = members[torch.randperm(len(members), generator=generator(seed, "subset", label))]
            self.targets[shuffled[count:]] = -1

    def _hold_out(self, part: float, rng: random.Random) -> None:
        """Positions count within what is left of the task's list, which shrinks class by class."""
        targets = self.targets.tolist()
        for task in self.tasks:
            left = self._members(self.targets, task).tolist()
            for label in range(task.old, task.seen):
                positions = [at for at, index in enumerate(left) if targets[index] == label]
                for at in sorted(rng.sample(positions, round(len(positions) * part)), reverse=True):
                    self._held_out[left.pop(at)] = True

    @staticmethod
    def _members(targets: Tensor, task: Task) -> Tensor:
        return ((targets >= task.old) & (targets < task.seen)).nonzero()[:, 0]

    def train(self, task: Task) -> Tensor:
        """Training images of a task, without the held-out ones; indices in the source's order."""
        members = self._members(self.targets, task)
        return members[~self._held_out[members]]

    def validation(self, task: Task) -> Tensor:
        """Held-out images of a task, in the order in which the released code lists them: class by class."""
        members = self._members(self.targets, task)
        held = members[self._held_out[members]]
        return torch.cat([held[self.targets[held] == label].flip(0) for label in range(task.old, task.seen)])

    def test(self, task: Task) -> Tensor:
        """Test images of a task."""
        return self._members(self.test_targets, task)

    def by_class(self, task: Task) -> list[Tensor]:
        """``train(task)``, one tensor a class."""
        members = self.train(task)
        return [members[self.targets[members] == label] for label in range(task.old, task.seen)]
