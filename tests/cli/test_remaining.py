"""The estimate of what is left, on a simulated clock: steady from the first tenth of a run on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cilnorm.batch import Task
from cilnorm.cli.remaining import Remaining
from cilnorm.experiment import runner
from cilnorm.experiment.runner import run
from cilnorm.registry import Registry
from cilnorm.spec import Settings, Spec, resolve, to_yaml
from cilnorm.sweep.expected_work import ExpectedWork
from tests.conftest import TINY

pytestmark = pytest.mark.slow


@dataclass
class Simulated:
    """A run's events, each with the time at which it comes.

    Attributes:
        epochs: (task, phase, epochs, steps an epoch) in order.
        step: seconds of a step.
        slow: so many first steps take three times as long.
        evaluation: seconds a seen class, after each task.
    """

    epochs: list[tuple[int, str, int, int]]
    sizes: tuple[int, ...]
    folder: str = ""
    step: float = 0.1
    slow: int = 0
    evaluation: float = 0.0
    now: float = field(default=0.0)
    taken: int = 0

    @property
    def steps(self) -> int:
        return sum(epochs * steps for _, _, epochs, steps in self.epochs)

    def events(self) -> Iterator[dict[str, Any]]:
        yield {"event": "run", "folder": self.folder, "tasks": len(self.sizes), "sizes": self.sizes, "matrix": [],
               "seconds": self.now}  # fmt: skip
        for task in range(1, len(self.sizes) + 1):
            yield {"event": "task", "task": task, "seconds": self.now}
            for _, phase, epochs, steps in (each for each in self.epochs if each[0] == task):
                for epoch in range(1, epochs + 1):
                    for step in range(1, steps + 1):
                        self.now += self.step * (3 if self.taken < self.slow else 1)
                        self.taken += 1
                        yield {"event": "step", "step": step, "of": steps, "epoch": epoch, "epochs": epochs}
                    yield {"event": "epoch", "task": task, "phase": phase, "epoch": epoch, "of": epochs, "steps": steps,
                           "terms": {}, "seconds": self.now}  # fmt: skip
            self.now += self.evaluation * sum(self.sizes[:task])
            yield {"event": "accuracy", "task": task, "accuracy": [1.0] * task, "seconds": self.now}

    def told(self, registry: Registry | None = None) -> list[tuple[float, float, float | None]]:
        """(part of all steps that is done, time, estimate) after every event."""
        remaining = Remaining(registry, lambda: self.now)
        found = []
        for event in self.events():
            remaining(event)
            found.append((self.taken / self.steps, self.now, remaining.seconds))
        return found


def worst(found: list[tuple[float, float, float | None]], after: float) -> float:
    """The largest error from that part of the steps on, as a part of the whole time that is left."""
    end = found[-1][1]
    errors = []
    for part, now, estimate in found:
        if part >= after and end - now > 0.05 * end:
            assert estimate is not None
            errors.append(abs(estimate - (end - now)) / (end - now))
    return max(errors)


def quick(folder: Path, registry: Registry, **asked: Any) -> Spec:
    """The spec of a folder as a run writes it: three times the epochs in the first task, rows 48:16."""
    schedule = {"epochs": 8, "first_task": 3.0}
    preset = {**TINY, "tasks": 10, "rows": [48, 16], "memory": 200, "schedule": schedule}
    spec = resolve("tiny", registry, Settings({"tiny": preset}, {}), **asked)
    folder.mkdir(exist_ok=True)
    (folder / "spec.yaml").write_text(to_yaml(spec))
    return spec


def planned(task: int, epochs: int = 8) -> list[tuple[int, str, int, int]]:
    """600 images a task: 10 steps an epoch of 64 rows, later 13 of 48 current ones."""
    return [(task, "main", 24 if task == 1 else epochs, 10 if task == 1 else 13)]


SIZES = (10,) * 10
STEPS = [each for task in range(1, 11) for each in planned(task)]


def test_slow_first_steps_and_a_long_first_task(tmp_path: Path, registry: Registry) -> None:
    quick(tmp_path, registry)
    simulated = Simulated(STEPS, SIZES, str(tmp_path), slow=40)  # a third of the first tenth
    assert worst(simulated.told(registry), after=0.1) < 0.2


def test_evaluation_that_grows(tmp_path: Path, registry: Registry) -> None:
    quick(tmp_path, registry)
    simulated = Simulated(STEPS, SIZES, str(tmp_path), slow=40, evaluation=0.03)
    found = simulated.told(registry)
    assert worst(found, after=0.25) < 0.2  # the first evaluation is over


def test_phases_of_the_method_count(tmp_path: Path, registry: Registry) -> None:
    quick(tmp_path, registry, method="two-phases")
    tails = [(task, "tail", 2, 3) for task in range(2, 11)]  # 200 images of the memory, 64 at a time
    simulated = Simulated(sorted([*STEPS, *tails]), SIZES, str(tmp_path), slow=40)
    assert worst(simulated.told(registry), after=0.1) < 0.2


def test_shuffled_batches_take_longer_as_the_memory_fills(tmp_path: Path, registry: Registry) -> None:
    quick(tmp_path, registry, **{"protocol.batches": "shuffled"})
    steps = [(1, "main", 24, 10), *((task, "main", 8, 13) for task in range(2, 11))]  # (600 + 200) / 64
    assert worst(Simulated(steps, SIZES, str(tmp_path), slow=40).told(registry), after=0.1) < 0.2


def test_a_first_task_of_half_of_the_classes(tmp_path: Path, registry: Registry) -> None:
    quick(tmp_path, registry, tasks=6, first_classes=None, first_task=1.0)
    sizes = (50, 10, 10, 10, 10, 10)
    steps = [(1, "main", 8, 47), *((task, "main", 8, 13) for task in range(2, 7))]
    assert worst(Simulated(steps, sizes, str(tmp_path), slow=30).told(registry), after=0.1) < 0.2


def test_without_the_spec_it_still_says_something() -> None:
    steps = [(task, "main", 4, 10) for task in range(1, 5)]
    assert worst(Simulated(steps, (2,) * 4, slow=10).told(), after=0.2) < 0.2
    found = Simulated(steps, (2,) * 4).told()
    assert found[3][2] is None  # too early
    assert found[-1][2] == 0


def test_a_resumed_run_counts_what_is_left(tmp_path: Path, registry: Registry) -> None:
    quick(tmp_path, registry)
    simulated = Simulated(STEPS, SIZES, str(tmp_path), now=500.0)
    remaining = Remaining(registry, lambda: simulated.now)
    ended = 500.0 + 0.1 * (8 * 13 * 5)
    remaining({"event": "run", "folder": str(tmp_path), "tasks": 10, "sizes": SIZES, "matrix": [[1.0]] * 5,
               "seconds": 500.0})  # fmt: skip
    remaining({"event": "task", "task": 6, "seconds": 500.0})
    for step in range(1, 14):
        simulated.now += 0.1
        remaining({"event": "step", "step": step, "of": 13, "epoch": 1, "epochs": 8})
    assert remaining.seconds == pytest.approx(ended - simulated.now, rel=0.1)


def test_expected_steps_are_those_of_a_run(
    tiny: Callable[..., Spec], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "draw_figures", lambda *_: None)
    for number, asked in enumerate(({"method": "two-phases"}, {"protocol.batches": "shuffled"}, {"method": "joint"})):
        spec = tiny(**asked)
        taken: dict[int, list[float]] = {}

        def count(event: dict[str, Any], taken: dict[int, list[float]] = taken) -> None:
            if event["event"] == "epoch":
                taken.setdefault(event["task"] - 1, []).append(event["steps"])

        run(spec, tmp_path / str(number), device="cpu", registry=registry, watch=[count])
        work = ExpectedWork((2, 2, 2), spec, registry.methods[spec.method].build(**spec.method_options))
        images = work.images(0, "seen" if spec.method == "joint" else "mixed", taken[0][0])
        for task, steps in taken.items():
            phases = work.method.phases(Task(task, (2, 2, 2)))  # type: ignore[union-attr]
            assert sum(work.phases(task, images)) == pytest.approx(sum(steps), rel=0.35), (asked, task, phases)
