"""Running statistics measured anew on equally many images of every class: within a run, and on a finished one.

Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, https://arxiv.org/abs/2105.07576, on what a class-incremental
learner still has: exemplars of the old classes, and as many images of each new class, drawn for the purpose. Images are
augmented as in training. The measuring itself is ``cilnorm.running.measure_statistics``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from cilnorm import registry as registries
from cilnorm.batch import Batch, Composition, Task
from cilnorm.experiment.assembly import Assembly
from cilnorm.experiment.evaluation import measure_accuracy
from cilnorm.experiment.finished import opened
from cilnorm.files import write_atomically
from cilnorm.registry import Registry
from cilnorm.running import measure_statistics
from cilnorm.spec import Spec
from cilnorm.storage.run_folder import FolderError, RunFolder
from cilnorm.telling import needs_rows, tell_batch
from cilnorm.training.memory import Memory
from cilnorm.training.randomness import generator

__all__ = ["balanced_rows", "measure_anew", "precise"]


def balanced_rows(memory: Memory, parts: Assembly, task: Task, seed: int) -> Tensor:
    """Indices (m · K,) of m training images of each of the K seen classes: every K in a row hold each class once.

    m is the number of the smallest class: in later tasks that of the exemplars, which are all used then.
    """
    classes = [*memory.exemplars[: task.old], *parts.stream.by_class(task)]
    count, random = min(map(len, classes)), generator(seed, "precise", task.index)
    drawn = [members[torch.randperm(len(members), generator=random)[:count]] for members in classes]
    rounds = [torch.stack(drawn)[torch.randperm(len(classes), generator=random), at] for at in range(count)]
    return torch.cat(rounds)


def measure_anew(spec: Spec, parts: Assembly, memory: Memory, task: Task) -> None:
    """Gives the network's layers the statistics of a class-balanced set of images, in batches of the run's size.

    Each view's own layers; the network looks as the first of them in the end.

    Raises:
        ValueError: the network keeps none.
    """
    for view in reversed(parts.net.views):
        parts.net.look(view)
        _measure_view(spec, parts, memory, task)


def _measure_view(spec: Spec, parts: Assembly, memory: Memory, task: Task) -> None:
    rows, ranks = balanced_rows(memory, parts, task, spec.seed), parts.ranks
    labels = iter(ranks.every(parts.stream.targets[rows].to(parts.device).tensor_split(_count(spec, rows))))

    def tell(count: int) -> None:
        composition = Composition.of_one_kind(count, task.index)  # no cut: rows of every task in any order
        parts.net.observe(composition)
        targets = next(labels)
        if needs_rows(parts.net):
            tell_batch(parts.net, Batch(torch.empty(0), targets, composition), task)

    gather = None if ranks.alone else ranks.of_all
    measure_statistics(parts.net, _batches(spec, parts, rows, task), tell, gather)


def _count(spec: Spec, rows: Tensor) -> int:
    """Of the batches into which rows are cut as evenly as can be, none smaller than the run's."""
    return max(1, len(rows) // sum(spec.rows))


def _batches(spec: Spec, parts: Assembly, rows: Tensor, task: Task) -> Iterator[Tensor]:
    """Augmented images of the rows, batch by batch; those batches that are this process's."""
    views = parts.train.draw(len(rows), generator(spec.seed, "precise augmentation", task.index))
    places = parts.ranks.every(torch.arange(len(rows)).tensor_split(_count(spec, rows)))
    for part, images in zip(places, parts.train.read([rows[part] for part in places]), strict=True):
        yield parts.train.seen(images, views[part].to(parts.device))


def precise(
    folder: Path,
    *,
    device: str = "auto",
    data_root: Path | None = None,
    registry: Registry | None = None,
    tell: Callable[[str], None] = lambda text: None,
    out: Path | None = None,
) -> dict[str, list[float]]:
    """What measuring anew does to a finished run: percent on each task ``before`` and ``after``, by the head.

    Written to ``precise.json``; the run stays as it is.

    Args:
        out: the folder of that file; ``probes/`` in the run's own by default.

    Raises:
        FolderError: the run is not finished, or ``out`` can't be written.
        ValueError: its norm keeps no running statistics.
        SpecError, DatasetError, CheckpointError: it can't be loaded.
    """
    registry = registry or registries.load()
    spec = RunFolder(folder).read_spec(registry)
    with opened(folder, spec, registry, device, data_root) as (parts, state):
        newest = parts.tasks(spec)[-1]
        accuracy = {"before": measure_accuracy(spec, parts, newest)[0]}
        measure_anew(spec, parts, state.memory, newest)
        accuracy["after"] = measure_accuracy(spec, parts, newest)[0]
    for name, row in accuracy.items():
        tell(f"{name:>6}: {sum(row) / len(row):6.2f} % on all tasks, {row[-1]:6.2f} on the newest")
    out = out or folder / "probes"
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "precise.json", json.dumps(accuracy, indent=1) + "\n")
    except OSError as error:
        raise FolderError(f"can't write {out}: {error.strerror or error}; give --out another folder") from error
    return accuracy
