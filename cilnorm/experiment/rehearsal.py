"""What can be known of a run before it trains: whether its parts can be built and its batches made."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cilnorm.batch import Task
from cilnorm.data.pixel_cache import image_set
from cilnorm.experiment.assembly import Assembly, assemble
from cilnorm.hookspecs import Dataset
from cilnorm.images import DatasetError, ImageSet
from cilnorm.method import Phase
from cilnorm.registry import Registry
from cilnorm.spec import Spec, SpecError
from cilnorm.storage.run_folder import FolderError
from cilnorm.training.epoch_plan import NoBatch, draw_pool, phase_sources, plan_epoch
from cilnorm.training.held_out import held_per_class
from cilnorm.training.ranks import ALONE, Ranks

__all__ = ["assemble_checked", "check_batches", "check_place", "loading_once"]

FEW = 1024  # rows that fit everywhere; up to there a batch may hold an image more than once


def assemble_checked(
    spec: Spec, registry: Registry, device: torch.device, data_root: Path | None, ranks: Ranks = ALONE
) -> Assembly:
    """The parts of a run, every batch of which can be made, and shared by the processes of the run.

    Raises:
        SpecError, DatasetError: they can't be built, or no batch of theirs.
    """
    parts = assemble(spec, registry, device, data_root, ranks)
    check_batches(spec, parts)
    return parts


def check_batches(spec: Spec, parts: Assembly) -> None:
    """Lays out the first epoch of every phase of every task, in numbers of images alone.

    Raises:
        SpecError: a batch has more rows than there are images, can't be filled, or is refused by a norm.
    """
    rows, stream = sum(spec.rows), parts.stream
    images = int((stream.targets >= 0).sum())
    if rows > max(images, FEW):
        raise SpecError(f"rows {spec.rows[0]}:{spec.rows[1]}: a batch of {rows} rows, but {images} training images")
    stored: list[int] = []  # exemplars of each class
    met = 0  # training images so far
    for task in parts.tasks(spec):
        new = [len(members) for members in stream.by_class(task)]
        met += sum(new)
        after = _exemplars(spec, task, [*stored, *new], met)
        for phase in parts.method.phases(task):
            try:
                held = held_per_class(phase.held_out, stored) if phase.held_out else 0
                current, past = (max(0, sum(counts) - held * len(counts)) for counts in (new, stored))
                last = held * len(after) if phase.rows == "held-out" else sum(after)
                _check_phase(spec, parts, task, phase, (current, past, last, met))
            except (NoBatch, ValueError) as error:
                raise SpecError(f"task {task.index + 1}, phase {phase.name}: {error}") from error
        stored = after


def _exemplars(spec: Spec, task: Task, images: list[int], met: int) -> list[int]:
    """Exemplars of each class after a task; of a reservoir only their sum is known."""
    if spec.protocol.herding == "reservoir":
        return [min(spec.memory, met)]
    budget = spec.exemplars(task.seen)
    return [min(budget, count) for count in images]


def _check_phase(spec: Spec, parts: Assembly, task: Task, phase: Phase, images: tuple[int, int, int, int]) -> None:
    """``images``: of the task, in the memory before it, in the memory after it or held out, and of all tasks so far."""
    if (phase.rows == "balanced" or phase.held_out) and spec.protocol.herding == "reservoir":
        raise ValueError("herding: reservoir keeps different numbers of each class, and this phase wants equal ones")
    current, past, after, seen = (torch.arange(count) for count in images)
    pool = {"balanced": after, "held-out": after, "seen": seen}.get(phase.rows)
    if pool is None:
        pool = draw_pool(phase.rows, current, past, spec.protocol, torch.Generator())
    sources, composition = phase_sources(phase.rows, pool, (images[0], past), spec.rows, task, spec.protocol)
    plan = plan_epoch(sources, composition, spec.protocol, spec.seed, (task.index, 0), 0)
    for told in dict.fromkeys(plan.compositions) or (plan.composition,):
        if spec.protocol.batches == "stratified":  # others may differ, and a last one that doesn't divide isn't shared
            parts.ranks.refuse(told)
        parts.net.observe(told)


def loading_once(registry: Registry) -> Registry:
    """The same, but every data set is loaded once, or refused once, for the same folder and options.

    For what only looks at many runs: the images of all sets that it has met stay in memory.
    """
    shelf, met = registry.datasets, dict[str, ImageSet | DatasetError]()

    def load(record: Dataset, root: Path | None, **options: Any) -> ImageSet:
        key = repr((record.name, root, sorted(options.items())))
        if key not in met:
            try:
                met[key] = image_set(record.build(root, **options))
            except DatasetError as error:
                met[key] = error
        found = met[key]
        if isinstance(found, DatasetError):
            raise found
        return found

    records = {name: replace(record, build=partial(load, record)) for name, record in shelf.records.items()}
    return replace(registry, datasets=replace(shelf, records=records))


def check_place(path: Path) -> None:
    """Looks whether a folder could be made, without making it.

    Raises:
        FolderError: what stands in the way.
    """
    there = path.absolute()
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        raise FolderError(f"can't write the run folder {path}: {there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise FolderError(f"can't write the run folder {path}: Permission denied")
