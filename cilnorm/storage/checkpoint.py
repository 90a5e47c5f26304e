"""What a run needs to go on, written so that a crash at any instant loses at most what came after the last write.

Randomness needs no state: every stream is derived from the seed and the position (see ``cilnorm.training.randomness``).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from cilnorm.batch import Task
from cilnorm.files import plain_folder, write_atomically
from cilnorm.method import Past
from cilnorm.network import Network
from cilnorm.spec import Spec, to_mapping
from cilnorm.storage.environment import differences
from cilnorm.storage.tensor_file import DamagedFile, read_tensor_file, tensor_file
from cilnorm.training.engine import Engine
from cilnorm.training.memory import Memory
from cilnorm.training.stored import Stored

__all__ = ["CheckpointError", "Checkpoints", "RunState"]

FORMAT = 2


class CheckpointError(RuntimeError):
    """A checkpoint can't be read or does not belong to this run."""


@dataclass
class RunState:
    """Where a run stands; ``task``, ``phase``, ``epoch`` and ``step`` are the next to be done.

    Attributes:
        memory, past: what is kept of the tasks before.
        stored: what the method stores beside the exemplars.
        matrix: accuracies in percent, one row a finished task.
        by_head: the same for the head where another classifier fills the matrix.
        by_view: the same for other views of the network than the one that fills the matrix.
        others: what else was measured after each finished task, see ``experiment.evaluation.Measured``.
        steps: updates taken so far, those of the epoch at hand left out.
        logged: bytes of the log that tell of all this, and of nothing that came later.
        best: lowest held-out loss of the phase and the weights that had it (``keep: best`` only).
        pool: images of the phase's first rows, chosen when the phase began.
        optimizer: state of the phase's optimiser, for an engine that continues it.
        sums: of each term of the loss over the steps of the epoch at hand.
    """

    task: int = 0
    phase: int = 0
    epoch: int = 0
    step: int = 0
    memory: Memory = field(default_factory=Memory)
    past: Past | None = None
    stored: Stored = field(default_factory=Stored)
    matrix: list[list[float]] = field(default_factory=list)
    by_head: list[list[float]] = field(default_factory=list)
    by_view: dict[str, list[list[float]]] = field(default_factory=dict)
    others: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    logged: int = 0
    best: tuple[float, dict[str, torch.Tensor]] | None = None
    pool: torch.Tensor | None = None
    optimizer: dict[str, Any] | None = None
    sums: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def midway(self) -> bool:
        """Whether the task at hand was begun."""
        return (self.phase, self.epoch, self.step) != (0, 0, 0)


POSITION = ("task", "phase", "epoch", "step")
APART = (*POSITION, "memory", "stored", "past", "best")  # stored in a form of their own; all other fields as they are
ADDED = ("by_view", "others")  # since 0.1.0; as at a run's start where a checkpoint has none
PLAIN = tuple(each.name for each in fields(RunState) if each.name not in APART)


@dataclass(frozen=True)
class Checkpoints:
    """The last two of a run: ``last.pt``, and ``previous.pt`` in case that one is damaged.

    Attributes:
        folder: where they are.
        belongs: what must not change between writing and reading, by name: the spec's key, the images' digest.
        spec: its values, to say which of them changed.
    """

    folder: Path
    belongs: Mapping[str, str]
    spec: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, spec: Spec, digest: str) -> Checkpoints:
        """Those of a run of ``spec`` on images of this digest."""
        return cls(folder, {"spec": spec.key, "images": digest}, to_mapping(spec))

    @property
    def last(self) -> Path:
        """The newest one."""
        return self.folder / "last.pt"

    @property
    def previous(self) -> Path:
        """The one before."""
        return self.folder / "previous.pt"

    def write(self, state: RunState, net: Network, engine: Engine | None) -> None:
        """Writes ``state`` and the weights it goes with; the newest checkpoint becomes the previous one.

        Raises:
            OSError: the disk won't take it; the newest checkpoint is left whole.
        """
        content = {
            "format": FORMAT,
            "belongs": dict(self.belongs),
            "spec": dict(self.spec),
            "position": [getattr(state, name) for name in POSITION],
            "memory": list(state.memory.exemplars),
            "stored": dict(state.stored.tensors),
            "past": None if state.past is None else state.past.net.state_dict(),
            "past_tensors": {} if state.past is None else dict(state.past.tensors),
            "best": None if state.best is None else list(state.best),
            "net": net.state_dict(),
            **{name: getattr(state, name) for name in PLAIN},
            "optimizer": None if engine is None else engine.optimizer.state_dict(),
        }
        write_atomically(self.last, tensor_file(content), keep=self.previous)

    def read(self, net: Network, tasks: tuple[Task, ...], only_look: bool = False) -> tuple[RunState, str]:
        """Fills ``net``, fresh from ``assemble``; returns the state that goes with it, and a warning if there is one.

        A damaged newest checkpoint is set aside as ``damaged.pt``, and the one before is read. Where there is none yet,
        the state is that of a run's start.

        Args:
            only_look: change nothing in the folder; then a damaged newest checkpoint is an error.

        Raises:
            CheckpointError: both are damaged, or it is of another format, another spec or other images.
        """
        if not any(map(os.path.lexists, (self.last, self.previous))):
            return RunState(), ""
        content, warning = (self.newest(), "") if only_look else self._newest_sound()
        if content.get("format") != FORMAT:
            found = content.get("format")
            raise CheckpointError(f"{self.last}: written in format {found!r}; this version of cilnorm reads {FORMAT}")
        for name, now in self.belongs.items():
            then = content.get("belongs", {}).get(name)
            if then != now:
                what = f"its {name} is {then}, not {now}" + self._differing(name, content.get("spec"))
                raise CheckpointError(f"{self.last}: belongs to another run: {what}")
        try:
            state = _restored(content, net, tasks)
        except Exception as error:  # what is in it can be amiss in many ways
            reason = (str(error) or repr(error)).splitlines()[0]
            raise CheckpointError(f"{self.last}: does not fit the run: {reason}") from error
        if warning:
            os.replace(self.last, self.folder / "damaged.pt")  # or the next write would push out the good one
        return state, warning

    def _differing(self, name: str, then: object) -> str:
        """Which values of the spec were changed since, and how to undo it."""
        if name == "images":
            return "; the data set's files changed since the run began"
        if name != "spec" or not isinstance(then, dict) or not then:
            return ""
        found = differences(then, self.spec)
        return f"; spec.yaml was changed since the run began ({', '.join(found)}): put it back, or start a new run"

    def newest(self) -> dict[str, Any]:
        """What the newest checkpoint holds; nothing is changed in the folder.

        Raises:
            CheckpointError: it is damaged, or there is none.
        """
        killed_between_renames = os.path.lexists(self.previous) and not os.path.lexists(self.last)
        path = self.previous if killed_between_renames else self.last
        try:
            return self._unsealed(path)
        except (DamagedFile, OSError) as error:
            raise CheckpointError(f"{path} can't be read: {_reason(error)}") from error

    def _newest_sound(self) -> tuple[dict[str, Any], str]:
        """What the newest sound checkpoint holds, and a warning if that is not the newest of all.

        Raises:
            CheckpointError: there is none.
        """
        try:
            return self._unsealed(self.last), ""
        except (DamagedFile, OSError) as error:
            missing = isinstance(error, FileNotFoundError)
            amiss = f"{self.last} can't be read: {_reason(error)}"
        try:
            content = self._unsealed(self.previous)
        except FileNotFoundError:
            raise CheckpointError(f"{amiss}; there is none before it, so only --overwrite starts anew") from None
        except (DamagedFile, OSError) as error:
            raise CheckpointError(f"{amiss}; nor can the one before it: {_reason(error)}") from error
        # Missing, it was killed between the two renames of a write, which is how it should be.
        return content, "" if missing else f"{amiss}; going on from the checkpoint before it"

    def _unsealed(self, path: Path) -> dict[str, Any]:
        plain_folder(self.folder)
        return read_tensor_file(path)


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _restored(content: dict[str, Any], net: Network, tasks: tuple[Task, ...]) -> RunState:
    task, phase, epoch, step = content["position"]
    numbers = (task, phase, epoch, step, content["steps"], content["logged"])
    if not all(isinstance(number, int) and number >= 0 for number in numbers) or task > len(tasks):
        raise ValueError(f"it stands at {content['position']}")
    state = RunState(task, phase, epoch, step, Memory(tuple(content["memory"])))
    state.stored = Stored(state.memory.indices, content.get("stored", {}))  # 0.1.0 had no such method
    for name in PLAIN:
        if name in content or name not in ADDED:
            setattr(state, name, content[name])
    for earlier in tasks[:task]:
        net.grow(earlier.new)
    device = next(net.backbone.parameters()).device
    net.to(device)
    state.sums = {name: total.to(device) for name, total in state.sums.items()}
    if content["past"] is not None:
        teacher = copy.deepcopy(net)
        teacher.load_state_dict(content["past"])
        tensors = {name: tensor.to(device) for name, tensor in content["past_tensors"].items()}
        state.past = Past(teacher.eval().requires_grad_(False), tensors)
    if state.midway:
        net.grow(tasks[task].new)
        net.to(device)
    net.load_state_dict(content["net"])
    if content["best"] is not None:
        state.best = (content["best"][0], content["best"][1])
    return state
