"""Signals wait until a checkpoint is written."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["STOPPING", "Interrupted", "Interruptions"]

STATUS = 128  # plus the signal's number is what a shell reports of a command that a signal ended
STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop; all that was done is saved.

    Attributes:
        status: what the process should exit with, 130 for Ctrl-C.
    """

    def __init__(self, number: int, message: str = "") -> None:
        name = signal.Signals(number).name
        super().__init__(message or f"interrupted by {name}; `cilnorm resume FOLDER` goes on where a run was begun")
        self.number, self.status = number, STATUS + number


class Interruptions:
    """Says when a checkpoint is due, and lets Ctrl-C, SIGTERM and a terminal that hangs up wait until it is written.

    Between steps a signal only asks; elsewhere, and the second time, it interrupts at once. Use as a context manager,
    which puts the handlers back; outside the main thread, and where somebody else handles signals, it handles none.

    Args:
        every: seconds between checkpoints within an epoch; None for none.
        echo: seconds in which another signal is the same one once more: ``torchrun`` hands on what it is sent, and a
            terminal sends it to everybody.
    """

    def __init__(self, every: float | None = None, echo: float = 0.0) -> None:
        self._every, self._last = every, time.monotonic()
        self._echo, self._heard = echo, -math.inf
        self._asked, self._waiting = 0, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruptions:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
                if signal.getsignal(number) is default:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        echo, self._heard = time.monotonic() - self._heard < self._echo, time.monotonic()
        if echo:
            return
        if self._asked or not self._waiting:
            raise Interrupted(number)
        self._asked = number

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Signals wait in here."""
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False
        self._raise()

    @property
    def due(self) -> bool:
        """Whether it is time for a checkpoint."""
        late = self._every is not None and time.monotonic() - self._last >= self._every
        return bool(self._asked) or late

    def saved(self, most: Callable[[int], int] = int) -> None:
        """To be called when a checkpoint was written.

        Args:
            most: the largest of a number that each process of a run has; a signal to one of them is one to all.

        Raises:
            Interrupted: a signal came.
        """
        self._last = time.monotonic()
        self._asked = most(self._asked)
        self._raise()

    def _raise(self) -> None:
        if self._asked:
            raise Interrupted(self._asked)
