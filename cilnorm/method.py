"""What a method answers: a frozen dataclass of hyperparameters and six questions, five of which have a default."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from cilnorm.batch import Batch, Task
from cilnorm.heads import Head, Linear
from cilnorm.network import Network, Output

__all__ = ["Embed", "Method", "Past", "Phase", "Rows", "Schedule", "Step", "Tail"]

Embed = Callable[[Tensor], Tensor]
Rows = Literal["mixed", "doubled", "balanced", "even"]


@dataclass(frozen=True)
class Schedule:
    """How weights move during a phase: SGD whose learning rate falls.

    Attributes:
        epochs: passes over the images of a task.
        lr: learning rate at the start.
        momentum, weight_decay: of SGD; the decay applies to every weight, norms included, but those that a module
            names in ``without_decay``.
        annealing: ``steps``: at milestones; ``cosine``: along half a cosine wave that starts with the second epoch, so
            that the first two share a rate, as the code of PODNet and AFC has it.
        milestones: epochs, counted from 0, from which on the rate of ``steps`` is multiplied by ``gamma``.
        gamma: see milestones.
        clip: bound on the norm of the gradient; 0 for none.
        clamp: bound on the size of each entry of the gradient; 0 for none.
        first_task: times as many epochs in the first task, which starts from nothing; milestones move along. In
            PyCIL's terms, ``init_epoch`` over ``epochs``.
    """

    epochs: int = 1
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 1e-4
    annealing: Literal["steps", "cosine"] = "steps"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    clip: float = 0.0
    clamp: float = 0.0
    first_task: float = 1.0

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, not {self.epochs}")
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0, not {self.lr}")
        if not 0 < self.first_task < math.inf:
            raise ValueError(f"first_task must be above 0, not {self.first_task}")
        for name in ("momentum", "weight_decay", "gamma", "clip"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} can't be negative: {getattr(self, name)}")

    def in_task(self, index: int) -> Schedule:
        """The schedule of a task, counted from 0."""
        if index:
            return self
        epochs = max(1, round(self.first_task * self.epochs))
        milestones = tuple(max(1, round(self.first_task * milestone)) for milestone in self.milestones)
        return replace(self, epochs=epochs, milestones=milestones)

    def rate(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 0."""
        if self.annealing == "cosine":
            return self.lr * (1 + math.cos(math.pi * max(epoch - 1, 0) / self.epochs)) / 2
        return self.lr * self.gamma ** sum(epoch >= milestone for milestone in self.milestones)


@dataclass(frozen=True)
class Tail:
    """A schedule in terms of the run's, so that it grows and shrinks with it; the rate stands still or falls in steps.

    Papers give such phases in epochs (40 after a main phase of 160). Told as a part they keep their weight in a run of
    10 epochs, or of 2.

    Attributes:
        epochs: part of the run's epochs, rounded, at least one epoch.
        lr: factor on the run's learning rate.
        milestones: parts of the tail's own epochs, see ``Schedule.milestones``.
    """

    epochs: float
    lr: float
    milestones: tuple[float, ...] = ()

    def of(self, run: Schedule) -> Schedule:
        """The schedule that this is in a run of schedule ``run``; all that is not told here is the run's."""
        epochs = max(1, round(self.epochs * run.epochs))
        milestones = tuple(round(part * epochs) for part in self.milestones)
        return replace(run, epochs=epochs, lr=self.lr * run.lr, annealing="steps", milestones=milestones)


@dataclass(frozen=True)
class Phase:
    """A stretch of training within a task.

    Attributes:
        name: for the log.
        rows: ``mixed``: current and past rows in the run's ratio; ``doubled``: the same, with current rows drawn from
            the current images and twice the memory; ``balanced``: equally many images of every seen class;
            ``even``: the memory and as many random current images. The last two have no current/past cut.
        schedule: one of its own, or told in terms of the run's; None for the run's.
        backbone: its mode; in ``eval`` its norms use, and keep, their running statistics.
        gradient_noise: η of normal noise of standard deviation η / (1 + epoch)^0.55 on every gradient; 0 for none.
    """

    name: str = "main"
    rows: Rows = "mixed"
    schedule: Schedule | Tail | None = None
    backbone: Literal["train", "eval"] = "train"
    gradient_noise: float = 0.0

    def schedule_in(self, run: Schedule) -> Schedule:
        """The phase's schedule in a run of schedule ``run``."""
        return self.schedule.of(run) if isinstance(self.schedule, Tail) else self.schedule or run


@dataclass(frozen=True, eq=False)
class Past:
    """What is kept of the tasks before: a frozen network, and tensors by name (importances, say)."""

    net: Network
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Step:
    """All that a loss may look at.

    Attributes:
        out: the network's output for the batch.
        old: the past network's output for it; None where there is none.
        past, batch, task, phase, net: as elsewhere.
    """

    out: Output
    old: Output | None
    past: Past | None
    batch: Batch
    task: Task
    phase: Phase
    net: Network


@dataclass(frozen=True)
class Method:
    """Base of every method; a subclass answers ``loss`` and whatever its paper says otherwise.

    Attributes:
        signed_embedding: whether the backbone's last ReLU is left out.
        needs_maps: whether the loss looks at stage maps, so that a backbone without any is refused before training.
        released: what the released code does differently, by field: the method's own hyperparameters, and fields of
            the protocol as ``protocol.FIELD``. Applied by ``protocol: released``.
    """

    signed_embedding: ClassVar[bool] = False
    needs_maps: ClassVar[bool] = False
    released: ClassVar[Mapping[str, Any]] = {}

    def head(self, dim: int) -> Head:
        """The classifier of a ``dim``-dimensional embedding."""
        return Linear(dim)

    def grow(self, net: Network, task: Task, new_images: Callable[[], list[Tensor]]) -> None:
        """Makes room for the task's classes.

        Args:
            new_images: embeds the new classes' training images with the network as it is, one (n, dim) a class; to be
                called before the head grows, if at all.
        """
        net.head.grow(task.new)

    def phases(self, task: Task) -> tuple[Phase, ...]:
        """What is trained in a task, in order."""
        return (Phase(),)

    def parameters(self, net: Network, phase: Phase) -> Iterable[nn.Parameter]:
        """The weights that move in a phase."""
        return net.parameters()

    def loss(self, step: Step) -> dict[str, Tensor]:
        """The terms of the objective by name; their sum is minimised."""
        raise NotImplementedError

    def remember(self, net: Network, task: Task, batches: Callable[[], Iterable[Batch]]) -> Past | None:
        """What the next tasks need of this one. Default: a frozen copy of the network, in evaluation mode."""
        teacher = copy.deepcopy(net).eval()
        return Past(teacher.requires_grad_(False))
