"""What happens in a run, told to its log and to whoever watches."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from cilnorm.storage.run_folder import RunFolder

__all__ = ["Teller", "Watcher"]

Watcher = Callable[[dict[str, Any]], None]


class Teller:
    """Hands events to the log and to whoever watches; keeps the time.

    Args:
        seconds_before: of work that a resumed run did earlier.
    """

    def __init__(self, folder: RunFolder, watch: Sequence[Watcher], seconds_before: float = 0.0) -> None:
        self._folder, self._watch = folder, watch
        self._began = time.perf_counter() - seconds_before

    @property
    def seconds(self) -> float:
        """Seconds of work so far, those before a resumption included."""
        return time.perf_counter() - self._began

    def __call__(self, event: str, **facts: Any) -> None:
        told = {"event": event, **facts, "seconds": round(self.seconds, 3)}
        self._folder.log(told)
        for watcher in self._watch:
            watcher(told)

    def step(self, step: int, of: int, epoch: int, epochs: int) -> None:
        """For watchers alone: a log line a step would be most of the log."""
        for watcher in self._watch:
            watcher({"event": "step", "step": step, "of": of, "epoch": epoch + 1, "epochs": epochs})
