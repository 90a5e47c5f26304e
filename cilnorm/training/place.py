"""Where this process stands among those that share a run, as ``torchrun`` says; torch is not needed to know it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from cilnorm.values import SpecError

__all__ = ["Place", "place"]

NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets for each process


@dataclass(frozen=True)
class Place:
    """A process among ``size``.

    Attributes:
        index: its number, from 0; number 0 leads: it alone writes and speaks.
        size: how many share the run.
        local: its number among those on its machine.
        locals: how many there are on its machine.
    """

    index: int = 0
    size: int = 1
    local: int = 0
    locals: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return not self.index


def place(environment: Mapping[str, str] = os.environ) -> Place:
    """Of this process, among those that ``torchrun`` started; alone where it did not.

    Raises:
        SpecError: the variables make no sense.
    """
    if not all(name in environment for name in NEEDED):
        return Place()
    try:
        index, size, local = (int(environment[name]) for name in NEEDED[:3])
        return Place(index, size, local, int(environment.get("LOCAL_WORLD_SIZE", local + 1)))
    except ValueError as error:
        raise SpecError(f"RANK, WORLD_SIZE and LOCAL_RANK are set, but not as torchrun sets them: {error}") from error
