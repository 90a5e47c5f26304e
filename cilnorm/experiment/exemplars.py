"""The exemplars that a run keeps after a task."""

from __future__ import annotations

from cilnorm.batch import Task
from cilnorm.experiment.assembly import Assembly
from cilnorm.experiment.evaluation import embed
from cilnorm.spec import Spec
from cilnorm.training.memory import Draws, Memory

__all__ = ["memory_with"]


def memory_with(spec: Spec, parts: Assembly, memory: Memory, task: Task) -> Memory:
    """The memory with the task's classes in it, chosen by the network as it is."""
    protocol, stream, draws = spec.protocol, parts.stream, Draws(spec.seed, task.index)
    if protocol.herding == "reservoir":
        met = sum(len(stream.train(earlier)) for earlier in stream.tasks[: task.index])
        return memory.fill(stream.by_class(task), spec.memory, met, draws)
    found = memory.collect(
        stream.by_class(task),
        embed(parts.net, parts.train, parts.ranks),
        spec.exemplars(task.seen),
        protocol.herding,
        protocol.herd_again,
        draws,
    )
    return parts.ranks.first(lambda: found)  # on a GPU others may round, and choose, apart
