"""What happens in a run, as records: the lines of events.jsonl, and what watchers and loggers are told.

``as_dict`` gives the form that leaves the run: ``event`` names the kind, the fields follow; None is left
out. Tasks, epochs and steps count from 1; accuracies are in percent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from cilnorm.spec import Spec

__all__ = [
    "AccuracyMeasured",
    "EpochEnded",
    "Event",
    "RunBegan",
    "RunEnded",
    "RunHalted",
    "StepTaken",
    "TaskBegan",
    "TrialEnded",
    "Warned",
]


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes:
        kind: its name in the log.
        logged: whether events.jsonl and the loggers get it; watchers get everything.
    """

    kind: ClassVar[str]
    logged: ClassVar[bool] = True

    def as_dict(self) -> dict[str, Any]:
        """``event``, then the fields that are not None."""
        facts = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"event": self.kind, **{name: value for name, value in facts.items() if value is not None}}


@dataclass(frozen=True)
class RunBegan(Event):
    """A run began or goes on; always the first event of a process.

    Attributes:
        tasks: how many it will learn in all.
        notice: a warning of the data set's; empty where there is none.
        steps: updates done before.
        matrix: rows of the accuracy matrix that are there already.
        sizes: classes of each task.
    """

    kind: ClassVar[str] = "run"
    folder: str
    tasks: int
    notice: str
    steps: int
    matrix: Sequence[Sequence[float]]
    method: str
    norm: str
    backbone: str
    dataset: str
    preset: str
    seed: int
    sizes: Sequence[int] = ()

    @classmethod
    def of(
        cls, spec: Spec, folder: str, sizes: Sequence[int], notice: str, steps: int, matrix: Sequence[Sequence[float]]
    ) -> RunBegan:
        """The event for a run of ``spec`` with tasks of so many classes each."""
        named = (spec.method, spec.norm, spec.backbone, spec.dataset, spec.preset, spec.seed)
        return cls(folder, len(sizes), notice, steps, matrix, *named, sizes)


@dataclass(frozen=True)
class TaskBegan(Event):
    """A task's training begins: its own classes, all seen with it, exemplars in memory."""

    kind: ClassVar[str] = "task"
    task: int
    classes: int
    seen: int
    memory: int


@dataclass(frozen=True)
class StepTaken(Event):
    """An update; for watchers alone, since a log line a step would be most of the log."""

    kind: ClassVar[str] = "step"
    logged: ClassVar[bool] = False
    step: int
    of: int
    epoch: int
    epochs: int


@dataclass(frozen=True)
class EpochEnded(Event):
    """An epoch ended: its phase, the learning rate, and each term of the loss as a mean over its steps."""

    kind: ClassVar[str] = "epoch"
    task: int
    phase: str
    epoch: int
    of: int
    lr: float
    steps: int
    terms: Mapping[str, float]


@dataclass(frozen=True)
class AccuracyMeasured(Event):
    """A task is learned.

    Attributes:
        accuracy: on each task so far, among all classes seen.
        by_head: the same by the head, where another classifier fills the matrix.
        memory: exemplars kept.
        by_view: the same by other views of the network than the one that fills the matrix.
        seen: classes among which images were classified.
        task_aware, top5, ece_old, ece_new: see ``cilnorm.experiment.evaluation.Measured``.
    """

    kind: ClassVar[str] = "accuracy"
    task: int
    accuracy: Sequence[float]
    by_head: Sequence[float] | None
    memory: int
    by_view: Mapping[str, Sequence[float]] | None = None
    seen: int | None = None
    task_aware: Sequence[float] | None = None
    top5: Sequence[float] | None = None
    ece_old: float | None = None
    ece_new: float | None = None


@dataclass(frozen=True)
class Warned(Event):
    """Something that the user should know."""

    kind: ClassVar[str] = "warning"
    text: str


@dataclass(frozen=True)
class TrialEnded(Event):
    """An option's value was tried on held-out images; for watchers alone."""

    kind: ClassVar[str] = "trial"
    logged: ClassVar[bool] = False
    options: Mapping[str, Any]
    accuracy: float


@dataclass(frozen=True)
class RunEnded(Event):
    """The run is finished; ``summary`` is that of summary.json, whose entries stand in the event themselves."""

    kind: ClassVar[str] = "finished"
    summary: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """``event``, then the entries of the summary."""
        return {"event": self.kind, **self.summary}


@dataclass(frozen=True)
class RunHalted(Event):
    """The run stopped before its end: where it stood, and why."""

    kind: ClassVar[str] = "stopped"
    where: str
    reason: str
