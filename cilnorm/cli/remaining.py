"""How long a run still takes: the steps that are left at the pace of the latest ones, and what comes between tasks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cilnorm.registry import Registry
from cilnorm.storage.run_folder import RunFolder
from cilnorm.sweep.expected_work import ExpectedWork

__all__ = ["Remaining", "expected_work"]

LEAST = 5  # steps before anything is said
MARKS = 400  # times that are kept
DEFAULT_IMAGES = 500.0  # of a class, until an epoch says how many


def expected_work(event: Mapping[str, Any], registry: Registry | None) -> ExpectedWork:
    """The work of the run that an event ``run`` is of; without its spec, all tasks are alike but for their classes."""
    sizes = tuple(event.get("sizes") or [1] * event["tasks"])
    if registry is None:
        return ExpectedWork(sizes)
    try:
        spec = RunFolder(Path(event["folder"])).read_spec(registry)
        return ExpectedWork(sizes, spec, registry.methods[spec.method].build(**spec.method_options))
    except Exception:  # an estimate is no reason to stop; whatever a plugin raises
        return ExpectedWork(sizes)


class Remaining:
    """Hears a run's events and says how many seconds are left.

    The pace is that of the later half of the steps so far, so that slow first ones (a kernel is compiled, a cache
    filled) are soon forgotten. Epochs that were seen tell how many steps others of the kind take. What comes between
    tasks, such as evaluation, is timed apart, and grows with the classes seen.

    Args:
        registry: of the run's method; without it all steps count alike.
        clock: in seconds.
    """

    def __init__(self, registry: Registry | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._registry, self._clock = registry, clock
        self._work = ExpectedWork(())
        self._images = DEFAULT_IMAGES
        self._task, self._phase, self._epoch = 0, 0, 0  # counted from 0; the epoch that is under way
        self._of, self._epochs, self._step = 0.0, 0, 0.0  # of the phase under way: steps an epoch, epochs, steps done
        self._done, self._trained = 0.0, 0.0  # steps of this process, and their seconds
        self._marks: list[tuple[float, float]] = [(0.0, 0.0)]
        self._between, self._of_between = 0.0, (0, 0.0)  # seconds since the last step; (classes, seconds) of the last
        self._now, self._read = 0.0, clock()
        self._training, self._ended = False, False  # whether the last event was of a step; whether an epoch ended

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Hears of an event."""
        passed = self._passed(event)
        handler = getattr(self, f"_on_{event['event']}", None)
        if handler is not None:
            handler(event, passed)

    def _passed(self, event: Mapping[str, Any]) -> float:
        """Seconds since the event before; logged ones say the run's own time, the others are timed here."""
        read = self._clock()
        now = event.get("seconds", self._now + read - self._read)
        passed, self._now, self._read = now - self._now, now, read
        return max(0.0, float(passed))

    def _on_run(self, event: Mapping[str, Any], passed: float) -> None:
        self._work = expected_work(event, self._registry)
        self._task, self._training = len(event["matrix"]), False

    def _on_task(self, event: Mapping[str, Any], passed: float) -> None:
        self._between += passed if self._training is False else 0.0
        self._task, self._phase, self._of, self._epochs, self._step = event["task"] - 1, -1, 0.0, 0, 0.0

    def _on_step(self, event: Mapping[str, Any], passed: float) -> None:
        if event["epoch"] < self._epoch or self._phase < 0 or event["epochs"] != self._epochs:
            self._phase += 1
        self._epoch = event["epoch"]
        self._learn(event["of"], event["epochs"])
        self._move((event["epoch"] - 1) * event["of"] + event["step"], passed)

    def _on_epoch(self, event: Mapping[str, Any], passed: float) -> None:
        self._phase = max(self._phase, 0)
        self._learn(event.get("steps") or self._of or self._work.epoch(self._task, "mixed", self._images), event["of"])
        self._move(event["epoch"] * self._of, passed)
        self._ended = True

    def _on_accuracy(self, event: Mapping[str, Any], passed: float) -> None:
        seen = sum(self._work.sizes[: event["task"]])
        self._of_between = (seen, self._between + passed)
        self._between, self._training = 0.0, False
        self._task, self._phase, self._of, self._epochs, self._step = event["task"], -1, 0.0, 0, 0.0

    def _learn(self, steps: float, epochs: int) -> None:
        """An epoch of the phase under way takes so many steps."""
        if steps != self._of and self._phase == 0:  # the first phase tells how many images a class has
            whole = steps * epochs if self._work.spec is None else steps
            self._images = self._work.images(self._task, self._rows(), whole)
        self._of, self._epochs = steps, epochs

    def _rows(self) -> str:
        """The rows of a task's first phase."""
        if self._work.method is None:
            return "mixed"
        from cilnorm.batch import Task

        return str(self._work.method.phases(Task(self._task, tuple(self._work.sizes)))[0].rows)

    def _move(self, step: float, passed: float) -> None:
        """So many steps of the phase are done."""
        new = max(0.0, step - self._step)
        self._step = step
        if not self._training and self._marks[1:]:  # growing the head and the like comes before a task's first step
            self._between, new = self._between + passed, 0.0 if new > 1 else new
        else:
            self._trained += passed
            self._done += new
            self._marks.append((self._done, self._trained))
        self._training = True
        if len(self._marks) > MARKS:
            self._marks = self._marks[::2]

    @property
    def steps_left(self) -> float:
        """Of this task and those that follow."""
        sizes = self._work.sizes
        left = max(0.0, self._of * self._epochs - self._step)
        if self._task < len(sizes):
            left += sum(self._work.phases(self._task, self._images)[self._phase + 1 :])
        return left + sum(sum(self._work.phases(task, self._images)) for task in range(self._task + 1, len(sizes)))

    @property
    def part(self) -> float:
        """How much of the whole run's steps is done, in [0, 1]."""
        sizes = self._work.sizes
        whole = sum(sum(self._work.phases(task, self._images)) for task in range(len(sizes)))
        return min(1.0, max(0.0, 1 - self.steps_left / whole)) if whole else 0.0

    @property
    def seconds(self) -> float | None:
        """What is left, in seconds; None while too little is known."""
        early = self._done < LEAST
        (first, began), (last, ended) = self._marks[0 if early else (len(self._marks) - 1) // 2], self._marks[-1]
        if last <= first or (early and not self._ended):
            return None
        classes, seconds = self._of_between
        seen = [sum(self._work.sizes[: task + 1]) for task in range(self._task, len(self._work.sizes))]
        between = sum(seconds * each / classes for each in seen) if classes else 0.0
        return self.steps_left * (ended - began) / (last - first) + between
