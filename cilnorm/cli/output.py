"""Standard output and error that may go away: a reader that has read enough, a full disk, a terminal that hangs up.

What can no longer be written is dropped, so that a run does not depend on whoever watches it.
"""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO, cast

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

__all__ = ["Lasting", "lasting_output"]


class Lasting(io.FileIO):
    """A stream of bytes that turns into the null device, for this process's children as well, when it can't be written.

    Attributes:
        error: what the system said then; None as long as the stream is whole.
    """

    error: OSError | None = None

    def write(self, data: Buffer) -> int:
        """Writes ``data`` or drops it; how many bytes were taken."""
        try:
            while (written := super().write(data)) is None:  # not a blocking one, and its reader is slow
                select.select([], [self.fileno()], [])
        except OSError as error:
            self.error = error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return memoryview(data).nbytes
        return written


@contextmanager
def lasting_output() -> Iterator[Lasting]:
    """``sys.stdout`` and ``sys.stderr`` that outlive their readers; where one was closed, it leads nowhere.

    The number of a closed standard stream would be given to the next file that is opened, and whatever is printed would
    go there. Streams that somebody put in the place of the system's are left alone.

    Yields:
        What lies below standard output.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
    before, raws = (sys.stdout, sys.stderr), (Lasting(1, "w", closefd=False), Lasting(2, "w", closefd=False))
    if sys.stdout is sys.__stdout__:
        sys.stdout = _text(before[0], raws[0], "surrogateescape")  # names of files may hold any byte
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(before[1], raws[1], "backslashreplace")
    try:
        yield raws[0]
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = before


def _text(stream: TextIO | None, raw: Lasting, errors: str) -> io.TextIOWrapper:
    """Text over ``raw`` in the stream's encoding; a sign that it does not have is written in another way."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    errors = errors if "utf" in encoding.lower() else "backslashreplace"
    return io.TextIOWrapper(io.BufferedWriter(cast(io.RawIOBase, raw)), encoding, errors, line_buffering=True)
