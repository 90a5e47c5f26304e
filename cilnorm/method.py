"""What a method answers: a frozen dataclass of hyperparameters and eight questions, seven of which have a default."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, cast

from torch import Tensor, nn

from cilnorm.batch import Batch, Task
from cilnorm.heads import Head, Linear
from cilnorm.network import Network, Output

__all__ = [
    "AUTHORS_PROTOCOL",
    "Annealing",
    "Embed",
    "Method",
    "Mode",
    "Past",
    "Phase",
    "Rows",
    "Schedule",
    "Step",
    "Tail",
]

# The protocol of released code that is its authors' own and knows nothing of the differences of the TBBN experiments.
AUTHORS_PROTOCOL: Mapping[str, Any] = {
    "protocol.epoch": "passes",
    "protocol.validation": 0.0,
    "protocol.keep": "last",
    "protocol.test_images": "all",
    "protocol.budget": "floor",
    "protocol.herding": "icarl",
    "protocol.herd_again": False,
}
Embed = Callable[[Tensor], Tensor]
Rows = Literal["mixed", "doubled", "balanced", "even", "seen", "held-out"]
Mode = Literal["train", "eval", "batch"]
Annealing = Literal["steps", "cosine", "cosine-at-once", "rise"]


@dataclass(frozen=True)
class Schedule:
    """How weights move during a phase: SGD whose learning rate falls.

    Attributes:
        epochs: passes over the images of a task.
        lr: learning rate at the start.
        momentum, weight_decay: of SGD; the decay applies to every weight, norms included, but those that a module
            names in ``without_decay``.
        annealing: ``steps``: at milestones; ``cosine``: along half a cosine wave that starts with the second epoch, so
            that the first two share a rate, as the code of PODNet and AFC has it; ``cosine-at-once``: along one that
            starts with the first epoch, as torch's ``CosineAnnealingLR``; ``rise``: in equal steps up to ``lr``.
        milestones: epochs, counted from 0, from which on the rate of ``steps`` is multiplied by ``gamma``.
        gamma: see milestones.
        clip: bound on the norm of the gradient; 0 for none.
        clamp: bound on the size of each entry of the gradient; 0 for none.
        first_task: times as many epochs in the first task, which starts from nothing; milestones move along. In
            PyCIL's terms, ``init_epoch`` over ``epochs``.
        first_epochs, first_milestones, first_lr, first_weight_decay: those of the first task where they are others
            altogether; null for those of every task, with ``first_task``.
    """

    epochs: int = 1
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 1e-4
    annealing: Annealing = "steps"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    clip: float = 0.0
    clamp: float = 0.0
    first_task: float = 1.0
    first_epochs: int | None = None
    first_milestones: tuple[int, ...] | None = None
    first_lr: float | None = None
    first_weight_decay: float | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "first_epochs"):
            if (getattr(self, name) or 1) < 1 or getattr(self, name) == 0:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("lr", "first_lr"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.first_epochs is not None and self.first_task != 1:
            raise ValueError(
                "first_epochs and first_task both say how long the first task is trained; give one of them"
            )
        if not 0 < self.first_task < math.inf:
            raise ValueError(f"first_task must be above 0, not {self.first_task}")
        for name in ("momentum", "weight_decay", "first_weight_decay", "gamma", "clip"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} can't be negative: {getattr(self, name)}")

    def in_task(self, index: int) -> Schedule:
        """The schedule of a task, counted from 0."""
        if index:
            return self
        epochs = self.first_epochs or max(1, round(self.first_task * self.epochs))
        milestones = self.first_milestones
        if milestones is None:
            milestones = tuple(max(1, round(self.first_task * milestone)) for milestone in self.milestones)
        lr = self.lr if self.first_lr is None else self.first_lr
        decay = self.weight_decay if self.first_weight_decay is None else self.first_weight_decay
        return replace(self, epochs=epochs, milestones=milestones, lr=lr, weight_decay=decay)

    def rate(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 0."""
        if self.annealing == "cosine":
            return self.lr * (1 + math.cos(math.pi * max(epoch - 1, 0) / self.epochs)) / 2
        if self.annealing == "cosine-at-once":
            return self.lr * (1 + math.cos(math.pi * epoch / self.epochs)) / 2
        if self.annealing == "rise":
            return self.lr * (epoch + 1) / self.epochs
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
        annealing: as in ``Schedule``.
        weight_decay: of its own; None for the run's.
    """

    epochs: float
    lr: float
    milestones: tuple[float, ...] = ()
    annealing: Annealing = "steps"
    weight_decay: float | None = None

    def of(self, run: Schedule) -> Schedule:
        """The schedule that this is in a run of schedule ``run``; all that is not told here is the run's."""
        epochs = max(1, round(self.epochs * run.epochs))
        milestones = tuple(round(part * epochs) for part in self.milestones)
        decay = run.weight_decay if self.weight_decay is None else self.weight_decay
        return replace(
            run,
            epochs=epochs,
            lr=self.lr * run.lr,
            weight_decay=decay,
            annealing=self.annealing,
            milestones=milestones,
        )


@dataclass(frozen=True)
class Phase:
    """A stretch of training within a task.

    Attributes:
        name: for the log.
        rows: ``mixed``: current and past rows in the run's ratio; ``doubled``: the same, with current rows drawn from
            the current images and twice the memory; ``balanced``: equally many images of every seen class;
            ``even``: the memory and as many random current images; ``seen``: every training image of every task so far,
            as no learner with a memory could; ``held-out``: those that were held out. The last four have no
            current/past cut.
        schedule: one of its own, or told in terms of the run's; None for the run's.
        backbone: its mode; in ``eval`` its norms use, and keep, their running statistics; in ``batch`` they use those
            of the batch, as in ``train``, and keep their running ones.
        gradient_noise: η of normal noise of standard deviation η / (1 + epoch)^0.55 on every gradient; 0 for none.
        view: how the network answers meanwhile, see ``Network.look``.
        fresh_head: whether the head's weights are drawn anew as it begins.
        held_out: part of every old class' exemplars that rows leave out, and as many images of each new class; for a
            later phase with the same part, whose rows are ``held-out``. Drawn anew in each task.
    """

    name: str = "main"
    rows: Rows = "mixed"
    schedule: Schedule | Tail | None = None
    backbone: Mode = "train"
    gradient_noise: float = 0.0
    view: str = ""
    fresh_head: bool = False
    held_out: float = 0.0

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
        exemplar_free: whether the method can learn without exemplars (``memory: 0``); batches of later tasks then hold
            current rows alone.
        needs_maps: whether the loss looks at stage maps, so that a backbone without any is refused before training.
        measures_means: whether what ``remember`` makes of batches is means over rows, each handed through
            ``Batch.mean``; then several processes of a run share the rows. Otherwise each looks at all of them.
        released: what the released code does differently, by field: the method's own hyperparameters, and fields of
            the protocol as ``protocol.FIELD``. Applied by ``protocol: released``.
        pycil: what PyCIL's code of the method does differently, likewise. Applied by ``protocol: pycil``.
    """

    exemplar_free: ClassVar[bool] = False
    needs_maps: ClassVar[bool] = False
    measures_means: ClassVar[bool] = False
    released: ClassVar[Mapping[str, Any]] = {}
    pycil: ClassVar[Mapping[str, Any]] = {}

    @property
    def signed_embedding(self) -> bool:
        """Whether the backbone's last ReLU is left out."""
        return False

    def head(self, dim: int) -> Head:
        """The classifier of a ``dim``-dimensional embedding."""
        return Linear(dim)

    def network(self, build: Callable[[], nn.Module]) -> Network:
        """What is trained. Default: one backbone, and ``head`` on its embedding.

        Args:
            build: makes a backbone, drawn from torch's global generator; to be called as often as one is needed, now or
                when the network grows.
        """
        backbone = build()
        return Network(backbone, self.head(cast(int, backbone.dim)))

    def grow(self, net: Network, task: Task, new_images: Callable[[], list[Tensor]]) -> None:
        """Makes room for the task's classes.

        Args:
            new_images: embeds the new classes' training images with the network as it is, one (n, dim) a class; to be
                called before the head grows, if at all.
        """
        net.grow(task.new)

    def phases(self, task: Task) -> tuple[Phase, ...]:
        """What is trained in a task, in order."""
        return (Phase(),)

    def parameters(self, net: Network, phase: Phase) -> Iterable[nn.Parameter]:
        """The weights that move in a phase."""
        return net.parameters()

    def loss(self, step: Step) -> dict[str, Tensor]:
        """The terms of the objective by name; their sum is minimised."""
        raise NotImplementedError

    def store(self, out: Output) -> Mapping[str, Tensor]:
        """What is stored beside each new exemplar, (n, width) by name; batches bring it back as ``Batch.stored``.

        Default: nothing.

        Args:
            out: the network's output for n new exemplars as they are, in evaluation mode, when their task has ended.
        """
        return {}

    def remember(self, net: Network, task: Task, batches: Callable[[], Iterable[Batch]]) -> Past | None:
        """What the next tasks need of this one. Default: a frozen copy of the network, in evaluation mode.

        A method that corrects the trained network (WA's alignment) does so here, before the copy: what is left is what
        chooses exemplars, is tested and is trained on.
        """
        teacher = copy.deepcopy(net).eval()
        return Past(teacher.requires_grad_(False))
