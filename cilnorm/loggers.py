"""A run's events, handed to the loggers that the user asked for by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from cilnorm.registry import Registry, UnknownName
from cilnorm.values import SpecError

__all__ = ["Loggers"]

IN_THE_LOG = ("run", "task", "epoch", "accuracy", "warning", "finished")


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
        self._loggers: list[Callable[[dict[str, Any]], None]] = []
        self._open = ExitStack()

    def __enter__(self) -> Loggers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def __call__(self, event: dict[str, Any]) -> None:
        """Hands on what events.jsonl holds as well, and nothing else."""
        if event["event"] not in IN_THE_LOG:
            return
        if event["event"] == "run":
            self._loggers = [record.build(Path(event["folder"])) for record in self._records]
            for logger in self._loggers:
                self._open.callback(getattr(logger, "close", lambda: None))
        for logger in self._loggers:
            logger(event)
