"""What a run needs to go on, written so that a crash at any instant loses at most one epoch.

Randomness needs no state: every stream is derived from the seed and the position (see ``cilnorm.streams``).
"""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cilnorm.batch import Task
from cilnorm.engine import Engine
from cilnorm.files import write_atomically
from cilnorm.memory import Memory
from cilnorm.method import Past
from cilnorm.network import Network

__all__ = ["CheckpointError", "State", "read_checkpoint", "write_checkpoint"]

FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint can't be read or does not belong to this run."""


@dataclass
class State:
    """Where a run stands; ``task``, ``phase`` and ``epoch`` are the next to be done.

    Attributes:
        memory, past: what is kept of the tasks before.
        matrix: accuracies in percent, one row a finished task.
        by_head: the same for the head where another classifier fills the matrix.
        steps: updates taken so far.
        best: lowest held-out loss of the phase and the weights that had it (``keep: best`` only).
        pool: images of the phase's first rows, chosen when the phase began.
        optimizer: state of the phase's optimiser, for an engine that continues it.
    """

    task: int = 0
    phase: int = 0
    epoch: int = 0
    memory: Memory = field(default_factory=Memory)
    past: Past | None = None
    matrix: list[list[float]] = field(default_factory=list)
    by_head: list[list[float]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    best: tuple[float, dict[str, torch.Tensor]] | None = None
    pool: torch.Tensor | None = None
    optimizer: dict[str, Any] | None = None

    @property
    def midway(self) -> bool:
        """Whether the task at hand was begun."""
        return (self.phase, self.epoch) != (0, 0)


def write_checkpoint(path: Path, key: str, state: State, net: Network, engine: Engine | None) -> None:
    """Writes ``state`` and the weights it goes with; ``key`` is the spec's.

    Raises:
        OSError: the disk won't take it; an older checkpoint of that name is left whole.
    """
    content = {
        "format": FORMAT,
        "key": key,
        "position": [state.task, state.phase, state.epoch],
        "memory": list(state.memory.exemplars),
        "past": None if state.past is None else state.past.net.state_dict(),
        "past_tensors": {} if state.past is None else dict(state.past.tensors),
        "matrix": state.matrix,
        "by_head": state.by_head,
        "steps": state.steps,
        "seconds": state.seconds,
        "best": None if state.best is None else list(state.best),
        "pool": state.pool,
        "net": net.state_dict(),
        "optimizer": None if engine is None else engine.optimizer.state_dict(),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def read_checkpoint(path: Path, key: str, net: Network, tasks: tuple[Task, ...]) -> State:
    """Fills ``net``, fresh from ``assemble``, and returns the state that goes with it.

    Raises:
        CheckpointError: the file is missing, damaged, of another format or of another spec.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] != FORMAT or content["key"] != key:
            raise CheckpointError(f"{path}: belongs to another run (format {content['format']}, spec {content['key']})")
        return _restored(content, net, tasks)
    except CheckpointError:
        raise
    except Exception as error:  # torch.load meets damage with many kinds of error
        first_line = (str(error) or repr(error)).splitlines()[0]
        raise CheckpointError(f"{path}: can't be read: {first_line}") from error


def _restored(content: dict[str, Any], net: Network, tasks: tuple[Task, ...]) -> State:
    task, phase, epoch = content["position"]
    state = State(task, phase, epoch, Memory(tuple(content["memory"])))
    for name in ("matrix", "by_head", "steps", "seconds", "pool", "optimizer"):
        setattr(state, name, content[name])
    for earlier in tasks[:task]:
        net.head.grow(earlier.new)
    device = next(net.backbone.parameters()).device
    net.to(device)
    if content["past"] is not None:
        teacher = copy.deepcopy(net)
        teacher.load_state_dict(content["past"])
        tensors = {name: tensor.to(device) for name, tensor in content["past_tensors"].items()}
        state.past = Past(teacher.eval().requires_grad_(False), tensors)
    if state.midway:
        net.head.grow(tasks[task].new)
        net.to(device)
    net.load_state_dict(content["net"])
    if content["best"] is not None:
        state.best = (content["best"][0], content["best"][1])
    return state
