"""The images that a run's batches are made of: which ones a phase draws from, an epoch's rows, and its batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cilnorm.batch import Composition, Task
from cilnorm.experiment.assembly import Assembly
from cilnorm.experiment.exemplars import memory_with
from cilnorm.method import Phase
from cilnorm.spec import Spec
from cilnorm.storage.checkpoint import RunState
from cilnorm.storage.event_log import EventLog
from cilnorm.storage.interruptions import Interruptions
from cilnorm.storage.run_folder import RunFolder
from cilnorm.training.batches import EpochBatches, draw_batches
from cilnorm.training.epoch_plan import EpochPlan, RowSource, draw_pool, phase_sources, plan_epoch
from cilnorm.training.held_out import hold_out
from cilnorm.training.protocol import Protocol
from cilnorm.training.randomness import generator
from cilnorm.training.ranks import ALONE, Ranks

__all__ = ["Running", "draw_phase_pool", "feed_epoch", "lay_out_epoch", "seen_batches"]


@dataclass(frozen=True, eq=False)
class Running:
    """What every part of a run needs; ``state`` alone changes."""

    spec: Spec
    parts: Assembly
    state: RunState
    folder: RunFolder
    tell: EventLog
    stops: Interruptions


def draw_phase_pool(run: Running, task: Task, phase: Phase) -> Tensor:
    """The images that a phase's first rows are drawn from, as ``Phase.rows`` says."""
    spec = run.spec
    if phase.rows == "seen":
        return torch.cat([run.parts.stream.train(seen) for seen in run.parts.stream.tasks[: task.index + 1]])
    if phase.rows == "balanced":
        return memory_with(spec, run.parts, run.state.memory, task).indices
    stream = generator(spec.seed, "even", task.index, run.state.phase)
    current, stored, held = _images(run, task, phase)
    return held if phase.rows == "held-out" else draw_pool(phase.rows, current, stored, spec.protocol, stream)


def _images(run: Running, task: Task, phase: Phase) -> tuple[Tensor, Tensor, Tensor]:
    """Images of the task and of the memory that the phase may use, and those that are held out of both."""
    stream, memory = run.parts.stream, run.state.memory
    if not phase.held_out:
        return stream.train(task), memory.indices, torch.empty(0, dtype=torch.long)
    drawn = generator(run.spec.seed, "held out", task.index)
    return hold_out(stream.by_class(task), memory.exemplars, phase.held_out, drawn)


def lay_out_epoch(run: Running, task: Task, phase: Phase, epoch: int) -> EpochPlan:
    """The epoch's rows."""
    spec, state = run.spec, run.state
    assert state.pool is not None
    current, stored, _ = _images(run, task, phase)
    images = len(current), stored
    sources, composition = phase_sources(phase.rows, state.pool, images, spec.rows, task, spec.protocol)
    return plan_epoch(sources, composition, spec.protocol, spec.seed, (task.index, state.phase), epoch)


def feed_epoch(run: Running, plan: EpochPlan, position: tuple[int, ...], ranks: Ranks = ALONE) -> EpochBatches:
    """The plan's batches.

    Args:
        position: names the epoch's stream of augmentation.
        ranks: the processes that share the rows of each; by default each process has all of them.
    """
    stream = generator(run.spec.seed, "augmentation", *position)
    return draw_batches(plan, run.parts.train, run.parts.stream.targets, stream, run.state.stored, ranks)


def seen_batches(run: Running, task: Task) -> EpochBatches:
    """One pass over all that the task was trained on, current and remembered, for methods that measure something.

    Each process makes the whole pass by itself, for what a method measures need not be a sum over rows; if it says that
    it is, each takes its part of the rows.
    """
    spec, state, rows = run.spec, run.state, sum(run.spec.rows)
    pool = torch.cat([run.parts.stream.train(task), state.memory.indices])
    composition, position = Composition.of_one_kind(rows, task.index), (task.index, state.phase)
    plan = plan_epoch([RowSource(pool, rows, "seen")], composition, Protocol(), spec.seed, position, 0)
    return feed_epoch(run, plan, (*position, 0), run.parts.ranks if run.parts.method.measures_means else ALONE)
