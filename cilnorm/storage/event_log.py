"""The one way out for what happens in a run: to its log, and to whoever watches."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from cilnorm.storage.events import Event
from cilnorm.storage.run_folder import RunFolder

__all__ = ["EventLog", "Watcher"]

Watcher = Callable[[dict[str, Any]], None]


class EventLog:
    """Hands events to events.jsonl and to whoever watches; keeps the time.

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

    def __call__(self, event: Event) -> None:
        facts = event.as_dict()
        if event.logged:
            facts["seconds"] = round(self.seconds, 3)
            self._folder.log(facts)
        for watcher in self._watch:
            watcher(facts)
