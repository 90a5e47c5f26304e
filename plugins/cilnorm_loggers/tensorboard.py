"""A run's numbers for TensorBoard, in ``tensorboard/`` of its folder; ``pip install 'cilnorm[tensorboard]'``.

Losses and learning rate stand over the steps taken, accuracies over the tasks learned. A resumed run goes on at the
step of its checkpoint; what was told beyond it is dropped from view.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cilnorm.hookspecs import Logger, hookimpl


class TensorBoardLogger:
    """Writes scalars with torch's ``SummaryWriter``, which is imported with the first event."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "tensorboard"
        self._writer: Any = None
        self._steps = 0

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Tells what an event holds and flushes it, an epoch being long enough for that."""
        if event["event"] == "run":
            from torch.utils.tensorboard import SummaryWriter

            self._steps = event["steps"]
            self._writer = SummaryWriter(str(self._folder), purge_step=self._steps + 1 if self._steps else None)
        elif event["event"] == "epoch":
            self._steps += event["steps"]
            for name, value in event["terms"].items():
                self._writer.add_scalar(f"loss/{name}", value, self._steps)
            self._writer.add_scalar("learning rate", event["lr"], self._steps)
            self._writer.flush()
        elif event["event"] == "accuracy":
            row, task = event["accuracy"], event["task"]
            for number, value in enumerate(row, 1):
                self._writer.add_scalar(f"accuracy/task {number}", value, task)
            self._writer.add_scalar("accuracy/mean of seen tasks", sum(row) / len(row), task)
            self._writer.flush()

    def close(self) -> None:
        """Closes the file of the last run."""
        if self._writer is not None:
            self._writer.close()


@hookimpl
def cilnorm_loggers() -> Sequence[Logger]:
    return [
        Logger("tensorboard", TensorBoardLogger, needs=("tensorboard",), files=("tensorboard/events.out.tfevents.*",))
    ]
