"""What a method answers: a frozen dataclass of hyperparameters and six questions, five of which have a default."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from cilnorm.batch import Batch, Task
from cilnorm.heads import Head, Linear
from cilnorm.network import Network, Output

__all__ = ["Embed", "Method", "Past", "Phase", "Schedule", "Step"]

Embed = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Schedule:
    """How weights move during a phase: SGD whose learning rate falls at milestones.

    Attributes:
        epochs: how many.
        lr: learning rate at the start.
        momentum, weight_decay: of SGD; the decay applies to every weight, norms included.
        milestones: epochs, counted from 0, from which on the rate is multiplied by ``gamma``.
        gamma: see milestones.
        clip: bound on the norm of the gradient; 0 for none.
    """

    epochs: int = 1
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 1e-4
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    clip: float = 0.0

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, not {self.epochs}")
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0, not {self.lr}")
        for name in ("momentum", "weight_decay", "gamma", "clip"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} can't be negative: {getattr(self, name)}")

    def rate(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 0."""
        return self.lr * self.gamma ** sum(epoch >= milestone for milestone in self.milestones)


@dataclass(frozen=True)
class Phase:
    """A stretch of training within a task.

    Attributes:
        name: for the log.
        rows: ``mixed``: current and past rows in the run's ratio; ``balanced``: equally many images of every seen
            class, without a current/past cut.
        schedule: None for the run's own.
    """

    name: str = "main"
    rows: Literal["mixed", "balanced"] = "mixed"
    schedule: Schedule | None = None


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
        released: what the released code does differently, by field: the method's own hyperparameters, and fields of
            the protocol as ``protocol.FIELD``. Applied by ``protocol: released``.
    """

    signed_embedding: ClassVar[bool] = False
    released: ClassVar[Mapping[str, Any]] = {}

    def head(self, dim: int) -> Head:
        """The classifier of a ``dim``-dimensional embedding."""
        return Linear(dim)

    def grow(self, net: Network, task: Task, new_images: Callable[[], list[Tensor]]) -> None:
        """Makes room for the task's classes; ``new_images()`` embeds their training images, one (n, dim) a class."""
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
