"""Small images, settings and tellings for checks: a run over two tasks takes a second or two."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cilnorm import registry as registries
from cilnorm.batch import Batch, Composition, Task, set_composition
from cilnorm.experiment.runner import Result, run
from cilnorm.hookspecs import Dataset, Record
from cilnorm.images import ImageSet
from cilnorm.registry import Registry
from cilnorm.rows_aware import RowsAware
from cilnorm.spec import Settings, Spec, resolve
from cilnorm.telling import tell_rows

__all__ = [
    "COMPOSITION",
    "SIZES",
    "batch",
    "describe",
    "images",
    "one_thread",
    "registry_with",
    "rows",
    "tell",
    "toy_run",
    "toy_spec",
]

COMPOSITION = Composition(12, 4, 3)
SIZES = (2, 2)
PRESET: dict[str, Any] = {
    "method": "ft",
    "norm": "bn",
    "backbone": "resnet8",
    "dataset": "toy-images",
    "classes": 4,
    "tasks": 2,
    "memory": 16,
    "rows": [12, 4],
    "augmentation": {"pad": 1, "crop": "random", "flip": True},
    "schedule": {"epochs": 1, "lr": 0.05, "momentum": 0.9},
}


def images(root: Path | None, *, classes: int = 4, train: int = 24, test: int = 10, size: int = 16) -> ImageSet:
    """So many training and test images a class: noise around one colour."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.randint(0, 256, (classes, 3, 1, 1), generator=generator)

    def split(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(classes).repeat(count)
        noise = torch.randint(-60, 61, (len(labels), 3, size, size), generator=generator)
        return (colours[labels] + noise).clamp(0, 255).to(torch.uint8), labels

    names = tuple(f"colour {number}" for number in range(classes))
    return ImageSet(*split(train), *split(test), names, (0.5,) * 3, (0.3,) * 3, digest="0" * 64)


def registry_with(kind: str = "", record: Record | None = None) -> Registry:
    """All that is installed, the toy images, and a record in the place of any other of its name."""
    registry = registries.load()
    shelves = {"dataset": {"toy-images": Dataset("toy-images", images)}}
    if record is not None:
        shelves.setdefault(kind, {})[record.name] = record  # type: ignore[assignment]
    changed: dict[str, Any] = {}
    for shelf in registry.shelves:
        if shelf.kind in shelves:
            changed[f"{shelf.kind}s"] = replace(shelf, records={**shelf.records, **shelves[shelf.kind]})
    return replace(registry, **changed)


def toy_spec(registry: Registry, **asked: Any) -> Spec:
    """Two tasks of two classes, one epoch each."""
    return resolve("toy", registry, Settings({"toy": PRESET}, {}), **asked)


def toy_run(registry: Registry, watch: Callable[[dict[str, Any]], None] | None = None, **asked: Any) -> Result:
    """Runs that on the CPU in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        where: dict[str, Any] = {"device": "cpu", "registry": registry, "figures": False}
        return run(toy_spec(registry, **asked), Path(folder) / "run", watch=[watch] if watch else [], **where)


def rows(*size: int, count: int = 16, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """A batch (count, *size), not centred."""
    return (torch.randn(count, *size, generator=torch.Generator().manual_seed(seed)) * 2 + 1).to(dtype)


def batch(task: Task = Task(1, SIZES), size: int = 16) -> Batch:  # noqa: B008  (frozen)
    """12 current and 4 past images of the second task."""
    targets = torch.cat([task.old + torch.arange(12) % task.new, torch.arange(4) % task.old])
    return Batch(rows(3, size, size), targets, Composition(12, 4, task.index))


def describe(composition: Composition = COMPOSITION, copies: int = 1) -> tuple[Tensor, Tensor]:
    """The task and label of each row, (N,) int64: past rows take turns in the tasks, labels are two a task.

    With ``copies`` that many batches of ``composition`` stand in one, all their current rows first.
    """
    current, past, task = composition.current, composition.past, composition.task
    earlier = torch.arange(past).remainder(max(task, 1)).repeat(copies)
    tasks = torch.cat([torch.full((copies * current,), task), earlier])
    turns = torch.cat([torch.arange(current).repeat(copies), torch.arange(past).repeat(copies)])
    return tasks, 2 * tasks + turns % 2


def tell(model: nn.Module, composition: Composition = COMPOSITION, copies: int = 1) -> None:
    """Tells all that a layer may ask for: counts, and the task and label of each row; ``copies`` as of ``describe``."""
    counts, task = (copies * composition.current, copies * composition.past), composition.task
    set_composition(model, Composition(*counts, task), expect_listeners=False)
    tasks, labels = describe(composition, copies)
    for module in model.modules():
        if isinstance(module, RowsAware) and module.needs_rows:
            tell_rows(module, past=tasks < task, task=task, tasks=tasks, labels=labels, repeat=True)


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
