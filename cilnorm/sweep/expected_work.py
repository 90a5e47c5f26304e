"""How many steps a run will take, task by task, before it has taken them: for estimates of the time that is left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cilnorm.batch import Task
from cilnorm.method import Method, Phase
from cilnorm.spec import Spec
from cilnorm.values import SpecError

__all__ = ["ExpectedWork"]


@dataclass(frozen=True)
class ExpectedWork:
    """A run's steps as its settings tell them.

    Attributes:
        sizes: classes of each task.
        spec: None where it is not known; then a task is one epoch of as many steps as it has ``images``.
        method: whose phases are counted; None for one phase a task.
    """

    sizes: Sequence[int]
    spec: Spec | None = None
    method: Method | None = None

    def phases(self, task: int, images: float) -> list[float]:
        """Steps of each phase of a task, counted from 0, with so many training images a class."""
        if self.spec is None:
            return [self.epoch(task, "mixed", images)]
        whole = Task(task, tuple(self.sizes))
        schedule = self.spec.schedule.in_task(task)
        phases = self.method.phases(whole) if self.method else (Phase(),)
        return [phase.schedule_in(schedule).epochs * self.epoch(task, phase.rows, images) for phase in phases]

    def epoch(self, task: int, rows: str, images: float) -> float:
        """Steps of an epoch of a phase with these ``rows``."""
        if self.spec is None:
            return images * self.sizes[task]
        (current, past), old = self.spec.rows, sum(self.sizes[:task])
        own, stored, total = images * self.sizes[task], self._stored(old, images), current + past
        if rows in ("mixed", "doubled") and old and stored:
            own += 2 * stored if rows == "doubled" else 0
            if self.spec.protocol.batches == "shuffled":
                return (own + stored) / total
            return max(own / current, stored / past) if self.spec.protocol.epoch == "cycle" else own / current
        taken = {
            "balanced": self._stored(old + self.sizes[task], images),
            "even": 2 * stored,
            "seen": images * (old + self.sizes[task]),
            "held-out": 0.1 * (own + stored),
        }
        return taken.get(rows, own) / total

    def images(self, task: int, rows: str, steps: float) -> float:
        """Training images a class, if an epoch of a phase takes so many steps; inverse of ``epoch``."""
        low, high = 0.0, 1.0
        while self.epoch(task, rows, high) < steps and high < 1e9:
            high *= 2
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.epoch(task, rows, middle) < steps else (low, middle)
        return high

    def weights(self, images: float = 500.0) -> list[float]:
        """The part of each task in all steps."""
        steps = [sum(self.phases(task, images)) for task in range(len(self.sizes))]
        return [each / (sum(steps) or math.inf) for each in steps]

    def _stored(self, classes: int, images: float) -> float:
        """Images in memory after so many classes."""
        if self.spec is None or not classes:
            return 0.0
        try:
            return classes * min(float(self.spec.exemplars(classes)), images)
        except SpecError:
            return 0.0
