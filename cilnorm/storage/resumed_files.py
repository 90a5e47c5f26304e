"""What a resumed run adds to is read, and checked before anything is added.

Each function raises FolderError where it can't, with the file, the line and the way out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from cilnorm.files import read_plain, read_text
from cilnorm.storage.own_files import LOG, FolderError

__all__ = ["ENVIRONMENT", "kept_log", "read_checked", "read_environment"]

ENVIRONMENT = "environment.json"
T = TypeVar("T")


def read_environment(folder: Path) -> dict[str, Any]:
    """environment.json; empty where there is none."""
    return read_checked(folder / ENVIRONMENT, _environment, {}, "what the run ran on so far")


def kept_log(folder: Path, logged: int) -> bytes | None:
    """The whole lines among the first ``logged`` bytes of the log.

    None if that is all there is, in a file that has no other name: a copy made of hard links shares it with its origin.
    """

    def lines(path: Path) -> bytes | None:
        raw = read_plain(path)
        kept = raw[: raw[:logged].rfind(b"\n") + 1]
        for number, line in enumerate(kept.split(b"\n")[:-1], 1):
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                event = None
            if not isinstance(event, dict):
                raise ValueError(f"line {number} is no event")
        return None if kept == raw and os.stat(path).st_nlink == 1 else kept

    return read_checked(folder / LOG, lines, None, "the events so far")


def read_checked(path: Path, read: Callable[[Path], T], missing: T, holds: str) -> T:
    """What ``read`` makes of a file, or ``missing`` where there is none.

    Args:
        holds: what the file holds, for the message.

    Raises:
        FolderError: it can\'t be read.
    """
    if not os.path.lexists(path):
        return missing
    try:
        return read(path)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        way_out = f"put a sound copy back, or move it away and go on without {holds}"
        raise FolderError(f"{path}: can't be read: {reason}; {way_out}") from error


def _environment(path: Path) -> dict[str, Any]:
    content = json.loads(read_text(path))
    if not isinstance(content, dict):
        raise ValueError("expected names with values")
    later = content.get("later", [])
    if not isinstance(later, list) or not all(isinstance(each, dict) for each in later):
        raise ValueError("later: expected a list of environments")
    return content
