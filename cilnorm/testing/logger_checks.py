"""What a logger promises: it hears every event, ends when it is told to, and says what it writes."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from cilnorm.experiment.loggers import Loggers
from cilnorm.experiment.runner import run
from cilnorm.hookspecs import Logger
from cilnorm.storage.events import AccuracyMeasured, EpochEnded, RunBegan, RunHalted
from cilnorm.testing import toys
from cilnorm.testing.checks import Check, NotChecked, attempt, wants

__all__ = ["logger_checks"]

WHERE = "cilnorm.hookspecs.Logger"


def installed(record: Logger) -> None:
    """What it needs, by the names under which it is imported."""
    absent = [name for name in record.needs if importlib.util.find_spec(name.partition(".")[0]) is None]
    if absent:
        raise NotChecked(f"{', '.join(absent)} is not installed")


def takes_events(record: Logger) -> None:
    installed(record)
    with tempfile.TemporaryDirectory() as folder:
        logger = attempt(lambda: record.build(Path(folder)), "build(folder) must be possible")
        wants(callable(logger), f"build returned a {type(logger).__name__}, which can't be called with an event")
        events = [
            RunBegan(folder, 2, "", 0, [], "ft", "bn", "resnet8", "toy-images", "toy", 0),
            EpochEnded(1, "main", 1, 1, 0.1, 4, {"ce": 1.5}),
            AccuracyMeasured(1, [50.0], None, 16),
            RunHalted("task 1", "RuntimeError: of a check"),
        ]
        for event in events:
            told = {"time": 0.0, **event.as_dict(), "seconds": 1.0}
            attempt(partial(logger, told), f"it can't take the event {event.kind!r}")
        close = getattr(logger, "close", None)
        if close is not None:
            attempt(close, "close() failed after a run that failed")


def says_what_it_writes(record: Logger) -> None:
    """``files`` has a pattern for each; `--overwrite` removes them and refuses a folder that holds anything else."""
    installed(record)
    registry = toys.registry_with("logger", record)
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for name, loggers in (("without", []), ("with", [record.name])):
            place = Path(folder) / name
            with Loggers(loggers, registry) as watch:
                where: dict[str, Any] = {"device": "cpu", "registry": registry, "figures": False}
                run(toys.toy_spec(registry), place, watch=[watch], **where)
            found.append({path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()})
        own = found[1] - found[0]
        wants(found[0] <= found[1], f"it removed {sorted(found[0] - found[1])[:1]} of the run")
        unsaid = sorted(name for name in own if not any(fnmatch(name, pattern) for pattern in record.files))
        wants(not unsaid, f"it wrote {unsaid[:1]}; add a pattern for it to the record's files=")


CHECKS: list[Callable[[Logger], None]] = [takes_events, says_what_it_writes]


def logger_checks(record: Logger) -> Iterator[Check]:
    """The checks of a logger."""
    for work in CHECKS:
        yield Check("logger", record.name, work.__name__, work, record, WHERE)
