"""A run's events, handed to the loggers that the user asked for by name.

A logger that raises is left out from then on, and said so once; the run goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from cilnorm.registry import Registry, UnknownName, last_line
from cilnorm.storage.events import Event
from cilnorm.values import SpecError

__all__ = ["Loggers"]

IN_THE_LOG = {kind.kind for kind in Event.__subclasses__() if kind.logged}


class Loggers:
    """Watches a run; use as a context manager. A logger is built when the run says which folder it has.

    Raises:
        SpecError: there is no such logger, or something that it needs is not installed.
    """

    def __init__(self, names: Sequence[str], registry: Registry) -> None:
        try:
            self._records = [registry.loggers[name] for name in dict.fromkeys(names)]
        except UnknownName as error:
            raise SpecError(str(error)) from None
        for record in self._records:
            for module in record.needs:
                if find_spec(module) is None:
                    hint = f"pip install 'cilnorm[{record.name}]' or {module}"
                    raise SpecError(f"the logger {record.name} needs {module}: {hint}")
        self._loggers: dict[str, Callable[[dict[str, Any]], None]] = {}

    def __enter__(self) -> Loggers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, logger in list(self._loggers.items()):
            self._attempt(name, getattr(logger, "close", _nothing))

    def __call__(self, event: dict[str, Any]) -> None:
        """Hands on what events.jsonl holds as well, and nothing else."""
        if event["event"] not in IN_THE_LOG:
            return
        if event["event"] == "run":
            folder = Path(event["folder"])
            for record in self._records:
                built = self._attempt(record.name, partial(record.build, folder))
                if built is not None:
                    self._loggers[record.name] = built
        for name, logger in list(self._loggers.items()):
            self._attempt(name, partial(logger, event))

    def _attempt(self, name: str, act: Callable[[], Any]) -> Any:
        """What ``act`` returns; None if it raises, whatever that is, Ctrl-C left out."""
        try:
            return act()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a stranger's may raise anything, SystemExit as well
            self._loggers.pop(name, None)
            print(f"cilnorm: the logger {name} is left out from here on: {last_line(error)}", file=sys.stderr)
            return None


def _nothing() -> None:
    pass
