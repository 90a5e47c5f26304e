"""What loggers share: the numbers of an event, the settings of a run, and the name that another program has for it."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cilnorm.files import read_text, write_atomically
from cilnorm.values import SpecError, parsed

METRICS = ("A_f", "A_a", "F", "forgetting", "A_l")


def numbers(event: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Name and value of every number that an event tells."""
    if event["event"] == "epoch":
        yield from ((f"loss/{name}", value) for name, value in event["terms"].items())
        yield "lr", event["lr"]
    elif event["event"] == "accuracy":
        yield from ((f"accuracy/task {task}", value) for task, value in enumerate(event["accuracy"], 1))
        yield "accuracy/mean", sum(event["accuracy"]) / len(event["accuracy"])


def metrics(event: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a finished run."""
    return {name: event[name] for name in METRICS if event.get(name) is not None}


def settings(folder: Path) -> dict[str, Any]:
    """All that was set, by dotted key; empty where spec.yaml can't be read."""
    try:
        content = parsed(read_text(folder / "spec.yaml"), "spec.yaml")
    except (OSError, ValueError, SpecError):
        return {}
    return dict(_flat(content, "")) if isinstance(content, dict) else {}


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def identifier(path: Path) -> str:
    """What a file of the run's folder notes as ``id``, so that a run that goes on is the same run; else a new one."""
    try:
        found = json.loads(read_text(path))["id"]
        if isinstance(found, str):
            return found
    except (OSError, ValueError, LookupError, TypeError):
        pass
    return secrets.token_hex(4)


def note(path: Path, **facts: str) -> None:
    """Writes the file that ``identifier`` reads."""
    write_atomically(path, json.dumps(facts) + "\n")
