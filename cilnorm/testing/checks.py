"""What a check is, and how it says what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cilnorm.registry import contain_exit, text_of

__all__ = ["Broken", "Check", "NotChecked", "attempt", "equal", "run_all", "wants"]


class Broken(AssertionError):
    """A promise that a plugin does not keep; the message says what happened, what was expected and how to mend it."""


class NotChecked(Exception):
    """A check that can't be made here; the message says why."""


@dataclass(frozen=True)
class Check:
    """One promise of a record, or of a file of presets and grids.

    Attributes:
        kind, name: of the record.
        promise: what is held, in a few words with ``_`` between them.
        work: takes the record; raises ``Broken`` or ``NotChecked``.
        where: what says more of the promise.
        slow: whether it starts processes or compiles.
    """

    kind: str
    name: str
    promise: str
    work: Callable[[Any], None]
    record: Any
    where: str
    slow: bool = False

    def __call__(self) -> None:
        """Checks.

        Raises:
            Broken: the promise is not kept; any other error of the plugin is told as one, too.
            NotChecked: it can't be known here.
        """
        try:
            with contain_exit(f"the {self.kind} {self.name}"):
                self.work(self.record)
        except NotChecked:
            raise
        except Broken as error:
            raise Broken(f"{self.kind} {self.name}, {self.words}: {error}. See {self.where}.") from error.__cause__
        except Exception as error:  # whatever a stranger's code runs into
            text = " ".join(text_of(error).split())[:300]
            raise Broken(f"{self.kind} {self.name}, {self.words}: it raised {text}. See {self.where}.") from error

    @property
    def words(self) -> str:
        """The promise as people read it."""
        return self.promise.replace("_", " ")

    @property
    def label(self) -> str:
        """For lists and for pytest."""
        return f"{self.kind}-{self.name}-{self.promise}"


def run_all(checks: Sequence[Check]) -> None:
    """Runs checks one after the other.

    Raises:
        Broken: all that is broken, a line each.
    """
    broken = []
    for check in checks:
        try:
            check()
        except NotChecked:
            continue
        except Broken as error:
            broken.append(str(error))
    if broken:
        raise Broken("\n".join(broken))


def wants(true: bool, otherwise: str) -> None:
    """Raises ``Broken`` with ``otherwise`` unless something is true."""
    if not true:
        raise Broken(otherwise)


def equal(one: Tensor, other: Tensor, otherwise: str, tolerance: float = 0.0) -> None:
    """Raises ``Broken`` unless two tensors are equal, or within a tolerance of values about 1."""
    try:
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, check_stride=False)
    except AssertionError as error:
        difference = str(error).splitlines()
        largest = next((line for line in difference if line.startswith("Greatest absolute")), difference[0])
        raise Broken(f"{otherwise} ({largest.split(' at ')[0].lower()})") from None


def attempt(work: Callable[[], Any], otherwise: str) -> Any:
    """What ``work`` returns; ``Broken`` with ``otherwise`` and the error's words where it raises."""
    try:
        return work()
    except Broken:
        raise
    except Exception as error:
        raise Broken(f"{otherwise}; it raised {' '.join(text_of(error).split())[:200]}") from error
