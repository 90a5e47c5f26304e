"""Images that do not stay on the device: a thread reads the rows of the next batches while the device is at work.

Rows come in the order in which they are asked for, into buffers that are used again and again, so memory does not grow
with the set. They are read from the file itself, not through a map of it: pages of a map count as the process's memory,
and one that can't be read kills the process where a file gives an error.
"""

from __future__ import annotations

import errno
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

__all__ = ["Residence", "StreamedImages", "fits", "free_memory"]

Residence = Literal["auto", "device", "stream"]
AHEAD, AHEAD_BYTES = 4, 256 << 20  # batches that are read ahead, fewer where they are large, but at least two
LARGEST_PART = 0.5  # of the free memory that images may take; the rest is for the network and what it makes of them
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container

ReadRow = Callable[[int, np.ndarray], None]


def free_memory(device: torch.device) -> int | None:
    """Bytes that could be had on a device; on the CPU what the system could free counts. None if it does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    for limit in LIMITS:
        with suppress(OSError, ValueError):  # "max" where there is none
            found.append(int(Path(limit).read_text()))
    return min(found, default=None) if device.type == "cpu" else None


def fits(size: int, device: torch.device) -> bool:
    """Whether images of ``size`` bytes may stay on a device: they take at most half of what is free there."""
    free = free_memory(device)
    return free is None or size <= LARGEST_PART * free


@dataclass(eq=False)
class _Slot:
    """A buffer (rows, 3, H, W), and what says when the device has copied it; pinned where the device is a GPU."""

    buffer: Tensor
    copied: Any = None

    def fill(self, rows: Sequence[int], read: ReadRow) -> Tensor:
        """Reads rows into the buffer, once its last content is no longer needed; runs in the thread."""
        if self.copied is not None:
            self.copied.synchronize()
        images = self.buffer[: len(rows)]
        for place, row in zip(images.numpy(), rows, strict=True):
            read(row, place)
        return images

    def hand_over(self, images: Tensor, device: torch.device, into: Tensor | None) -> Tensor:
        """The content on the device, and if ``into`` is given, there."""
        if into is None and device.type == "cpu":
            return images
        queued = device.type == "cuda"  # the copy waits its turn among the kernels; the buffer waits for it in ``fill``
        moved = images.to(device, non_blocking=queued) if into is None else into.copy_(images, non_blocking=queued)
        if queued:
            self.copied = torch.cuda.Event(blocking=True)
            self.copied.record(torch.cuda.current_stream(device))
        return moved


@dataclass(eq=False)
class StreamedImages:
    """Images (N, 3, H, W) uint8 outside the device, indexed as a tensor on it would be.

    Attributes:
        images: the images, on the CPU; not touched if there is a file.
        device: where they are wanted.
        file: a file that holds them one after another, from byte ``start`` on; None if there is none.
    """

    images: Tensor
    device: torch.device
    file: Path | None = None
    start: int = 0
    _read: ReadRow = field(init=False, repr=False)
    _thread: ThreadPoolExecutor | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        if self.file is None:
            self._read = _read_array(self.images.numpy())
        else:
            opened = self.file.open("rb", buffering=0)
            weakref.finalize(self, opened.close)
            self._read = _read_file(opened, self.start, len(self.images), self.images[0].nbytes)

    @property
    def shape(self) -> torch.Size:
        """(N, 3, H, W)."""
        return self.images.shape

    def __getitem__(self, rows: Tensor) -> Tensor:
        return next(self.read([rows]))

    def read(self, parts: Sequence[Tensor], into: Tensor | None = None) -> Iterator[Tensor]:
        """The images (n, 3, H, W) of each part on the device; those of the next parts are read meanwhile.

        Args:
            parts: indices, one tensor a batch.
            into: a tensor on the device that takes each batch in turn; all parts have its length then.

        Yields:
            Images that are valid until the next ones are asked for.

        Raises:
            OSError: rows can't be read, be it those of a later part.
            IndexError: there are no such rows.
        """
        rows = max(map(len, parts), default=0)
        ahead = min(max(AHEAD_BYTES // max(rows * self.images[0].nbytes, 1), 2), AHEAD, len(parts))
        pinned = self.device.type == "cuda"
        slots = [_Slot(torch.empty(rows, *self.shape[1:], dtype=torch.uint8, pin_memory=pinned)) for _ in range(ahead)]
        left = iter(parts)
        waiting = deque((slot, self._ask(slot, part)) for slot, part in zip(slots, left, strict=False))
        try:
            while waiting:
                for _, future in waiting:
                    if future.done():
                        future.result()  # raises what was raised in the thread
                slot, future = waiting.popleft()
                yield slot.hand_over(future.result(), self.device, into)
                waiting.extend((slot, self._ask(slot, part)) for part in islice(left, 1))
        finally:
            for _, future in waiting:
                future.cancel()

    def _ask(self, slot: _Slot, part: Tensor) -> Future[Tensor]:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="cilnorm-images")
        return self._thread.submit(slot.fill, part.tolist(), self._read)

    def close(self) -> None:
        """Ends the thread, and waits for its end; it starts anew if images are asked for again."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None


def _read_array(images: np.ndarray) -> ReadRow:
    def read(row: int, place: np.ndarray) -> None:
        place[...] = images[row]

    return read


def _read_file(file: Any, start: int, count: int, size: int) -> ReadRow:
    """Reads rows of ``size`` bytes; only one thread may use it."""

    def read(row: int, place: np.ndarray) -> None:
        if not 0 <= row < count:
            raise IndexError(f"{os.fspath(file.name)} has {count} images from byte {start} on, no image {row}")
        wanted, got = place.data.cast("B"), 0
        try:
            file.seek(start + row * size)
            while got < size:
                more = file.readinto(wanted[got:])
                if not more:
                    raise OSError(errno.EIO, f"ends within image {row}")
                got += more
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), os.fspath(file.name)) from error

    return read
