"""A finished run, opened for an experiment on its last weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from cilnorm.experiment.assembly import Assembly, assemble, pick_device
from cilnorm.registry import Registry
from cilnorm.spec import Spec
from cilnorm.storage.checkpoint import Checkpoints, RunState
from cilnorm.storage.run_folder import FolderError, RunFolder

__all__ = ["opened"]


@contextmanager
def opened(
    folder: Path, spec: Spec, registry: Registry, device: str = "auto", data_root: Path | None = None
) -> Iterator[tuple[Assembly, RunState]]:
    """The parts of the run in ``folder``, its network as it ended, and the state it ended in; nothing of it changes.

    Raises:
        FolderError: the run is not finished.
        SpecError, DatasetError, CheckpointError: it can't be loaded.
    """
    with closing(assemble(spec, registry, pick_device(device), data_root)) as parts:
        saved = Checkpoints.of(RunFolder(folder).checkpoints, spec, parts.images.digest)
        state, _ = saved.read(parts.net, parts.stream.tasks, only_look=True)
        if state.task < len(parts.tasks(spec)):
            raise FolderError(f"{folder} is not finished; `cilnorm resume {folder}` goes on")
        yield parts, state
