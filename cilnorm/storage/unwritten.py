"""A run's folder in a process that leaves the writing to another one."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cilnorm.storage.run_folder import MARK, FolderError, RunFolder

__all__ = ["UnwrittenFolder"]


class UnwrittenFolder(RunFolder):
    """Reads what ``RunFolder`` reads, and writes nothing.

    Raises:
        FolderError: no run was begun there, as this machine sees it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        if not self.holds_a_run(path):
            raise FolderError(
                f"{socket.gethostname()} does not see {path / MARK}; the folder of a run that several machines share "
                "must lie where all of them see it"
            )

    def reopen(self, logged: int, rows: Sequence[Sequence[float]]) -> None:
        """Nothing is taken back here."""

    def log(self, event: Mapping[str, Any]) -> None:
        """Nothing is logged here."""

    def logged(self) -> int:
        """Nothing is logged here."""
        return 0

    def write_environment(self, *_: Any, **__: Any) -> list[str]:
        """Nothing is compared here."""
        return []

    def write_confusion(self, counts: Sequence[Sequence[int]]) -> None:
        """Nothing is added here."""

    def _write(self, name: str, text: str) -> None:
        """Nothing is written here."""
