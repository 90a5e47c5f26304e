"""Which names in a run's folder are the run's own: they alone are ever removed, and whatever else lies there is not.

This is the one list of them. What a logger writes it declares itself (``Logger.files``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from cilnorm.files import PART

__all__ = ["FOLDERS", "LOCK", "LOG", "MARK", "FolderError", "Survey", "survey"]

MARK, LOCK, LOG = "spec.yaml", "lock", "events.jsonl"
FOLDERS = ("checkpoints", "figures")  # made with the run
FILES = (
    MARK, LOCK, LOG, "environment.json", "accuracy.csv", "confusion.csv", "summary.json", "tuning.json",
    "checkpoints/last.pt", "checkpoints/previous.pt", "checkpoints/damaged.pt",
    "figures/accuracy.png", "figures/accuracy.pdf", "figures/matrix.png", "figures/matrix.pdf", "figures/classes.png",
    "figures/classes.pdf",
    "probes/precise.json", *(f"probes/bn-bias.{kind}" for kind in ("json", "csv", "png", "svg", "pdf")),
)  # fmt: skip
TRIALS = tuple(f"trials/*/{name}" for name in FILES)  # runs of their own


class FolderError(OSError):
    """The folder of a run can't be used; the message is for the user."""


@dataclass(frozen=True)
class Survey:
    """What lies in a folder, names relative to it, with slashes.

    Attributes:
        own: files that a run writes.
        parts: what ``write_atomically`` leaves of such files when it is killed.
        folders: those that a run makes, the inner ones first.
        others: everything else; of a folder that is no run's, the folder alone.
    """

    own: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def begun(self) -> bool:
        """Whether there is more of a run than what one leaves that was killed before it had its spec."""
        return any(name != LOCK and not name.startswith("trials/") for name in self.own)

    def in_the_way(self, most: int = 6) -> str:
        """The names of the others, as many as a line takes."""
        rest = len(self.others) - most
        return ", ".join(self.others[:most]) + (f" and {rest} more" if rest > 0 else "")


def survey(folder: Path, also: Sequence[str] = ()) -> Survey:
    """Looks over a folder; links are not followed, and none of them is a run's own.

    Args:
        also: patterns of further own names, such as ``tensorboard/events.*``; ``*`` stands for no slash.

    Raises:
        OSError: it can't be read. A folder that is not there is empty.
    """
    if not os.path.lexists(folder):
        return Survey()
    patterns = [name.split("/") for name in (*FILES, *TRIALS, *also)]
    found: dict[str, list[str]] = {"own": [], "parts": [], "folders": [], "others": []}
    for kind, name in _walk(folder, (), patterns):
        found[kind].append(name)
    return Survey(*(tuple(found[kind]) for kind in ("own", "parts", "folders", "others")))


def _walk(folder: Path, inside: tuple[str, ...], patterns: Sequence[Sequence[str]]) -> Iterator[tuple[str, str]]:
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = (*inside, entry.name)
            name = "/".join(path)
            if entry.is_dir(follow_symlinks=False):
                if any(len(pattern) > len(path) and _fits(path, pattern) for pattern in patterns):
                    yield from _walk(Path(entry.path), path, patterns)
                    yield "folders", name
                else:
                    yield "others", name + "/"
            elif not entry.is_file(follow_symlinks=False):  # a link, a pipe, a device
                yield "others", name
            elif any(len(pattern) == len(path) and _fits(path, pattern) for pattern in patterns):
                yield "own", name
            else:
                yield ("parts" if any(_part_of(entry.name, pattern[-1]) for pattern in patterns) else "others"), name


def _fits(path: Sequence[str], pattern: Sequence[str]) -> bool:
    return all(fnmatchcase(name, part) for name, part in zip(path, pattern, strict=False))


def _part_of(name: str, whole: str) -> bool:
    """Whether a name is a temporary one of a file ``whole``."""
    return fnmatchcase(name, f".{whole}.*{PART}")
