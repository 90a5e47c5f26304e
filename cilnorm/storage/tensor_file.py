"""Tensors and plain values in one file that is checked before anything in it is believed.

The file is what ``torch.save`` writes, a zip archive, whose comment is the SHA-256 of all that stands before it: damage
shows at once, and ``torch.load(path, weights_only=True)`` reads it without this module. Reading trusts neither the
author: nothing is unpickled but containers and tensors, and no tensor is larger than the file that claims it.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cilnorm.files import open_plain, read_plain

__all__ = ["DamagedFile", "read_tensor_file", "tensor_file"]

COMMENT = b"sha256 %s"
COMMENT_BYTES = len(COMMENT) - 2 + 64
PICKLE_LIMIT = (
    16 << 20
)  # of the archive's table of contents; that of a ResNet-50 with all that belongs to it has 0.2 MB
NESTED_TUPLES, NESTED_VALUES, VALUES_LIMIT = 3, 20, 1_000_000
GLOBALS = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"}
STORAGE = re.compile(r"torch [A-Za-z0-9]+Storage")


class DamagedFile(ValueError):
    """A file is not what ``tensor_file`` makes; the message says in a line what is amiss."""


def tensor_file(content: dict[str, Any]) -> bytes:
    """The bytes of a file that holds ``content``: tensors, numbers, strings and None, in dicts and lists.

    Tensors are stored as they would lie on the CPU. Tuples come back as lists.

    Raises:
        Damaged: something else is in it.
    """
    buffer = io.BytesIO()
    torch.save(_Copier(math.inf).copy(content), buffer)  # of views and of tied tensors, too, each has bytes of its own
    archive = buffer.getvalue()[:-2] + struct.pack("<H", COMMENT_BYTES)
    return archive + _comment(archive)


def _comment(archive: bytes) -> bytes:
    return COMMENT % hashlib.sha256(archive).hexdigest().encode()


def read_tensor_file(path: Path) -> dict[str, Any]:
    """What a sealed file holds, on the CPU and independent of the file.

    Raises:
        Damaged: the checksum differs, or the file holds anything but tensors and plain values, or claims to hold more
            than it does.
        OSError: it can't be read.
    """
    try:
        raw = read_plain(path)
        if raw[-COMMENT_BYTES:] != _comment(raw[:-COMMENT_BYTES]):
            raise DamagedFile("its checksum is missing or differs")
        _look_over(raw)
        # Mapped, a tensor is a window on the file: a false claim of its size reaches nothing else and takes no memory.
        with _named(path) as name:
            content = torch.load(name, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(content, dict):
            raise DamagedFile(f"it holds a {type(content).__name__}")
        own: dict[str, Any] = _Copier(len(raw)).copy(content)
        return own
    except (DamagedFile, OSError):
        raise
    except Exception as error:  # zipfile, pickletools and torch meet damage with many kinds of error
        raise DamagedFile((str(error) or repr(error)).splitlines()[0]) from error


@contextmanager
def _named(path: Path) -> Iterator[str]:
    """A name for torch, which takes no path that is not UTF-8: that of the open file, where the system has such."""
    handle = open_plain(path)
    try:
        name = f"/proc/self/fd/{handle}"
        yield name if os.path.exists(name) else str(path)
    finally:
        os.close(handle)


def _look_over(raw: bytes) -> None:
    """Refuses archives that would grow when they are read, and pickles of more than containers and tensors."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise DamagedFile("it is compressed")
        if sum(entry.file_size for entry in entries) > len(raw):
            raise DamagedFile("it claims to hold more than it has bytes")
        [table] = [entry for entry in entries if entry.filename.endswith("data.pkl")]
        if table.file_size > PICKLE_LIMIT:
            raise DamagedFile("its table of contents is too long")
        for name in _names(archive.read(table)):
            if name not in GLOBALS and not STORAGE.fullmatch(name):
                raise DamagedFile(f"it asks for {name.replace(' ', '.')}")


def _names(pickled: bytes) -> Iterator[str]:
    """What a pickle asks for by name; tuples nested in tuples are refused, since hashing a nest of them never ends.

    The stack holds the depth of each value as a tuple, and None for a mark.
    """
    stack: list[int | None] = []
    memo: dict[int, int | None] = {}
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.proto > 2:
            raise DamagedFile(f"it has the instruction {opcode.name}")
        if opcode.name.endswith("PUT"):
            memo[int(argument or 0)] = stack[-1]
        elif opcode.name.endswith("GET"):
            stack.append(memo[int(argument or 0)])
        elif opcode.name == "MARK":
            stack.append(None)
        else:
            taken = _taken(stack, opcode.stack_before)
            depth = 1 + max(taken, default=0) if opcode.name.startswith("TUPLE") else 0
            if depth > NESTED_TUPLES:
                raise DamagedFile("it is nested too deeply")
            stack += [depth] * len(opcode.stack_after)
        if opcode.name in ("GLOBAL", "INST"):
            yield str(argument)


def _taken(stack: list[int | None], kinds: list[pickletools.StackObject]) -> list[int]:
    """What an instruction takes off the stack, back to the last mark if it says so."""
    taken: list[int] = []
    if pickletools.markobject in kinds:
        while (value := stack.pop()) is not None:
            taken.append(value)
        kinds = kinds[: kinds.index(pickletools.markobject)]
    for _ in kinds:
        taken.append(stack.pop() or 0)
    return taken


class _Copier:
    """Copies plain values and tensors to the CPU, as long as all tensors together stay within a budget of bytes."""

    def __init__(self, budget: float) -> None:
        self._bytes, self._values = budget, VALUES_LIMIT

    def copy(self, value: Any, depth: int = 0) -> Any:
        """The copy; tuples become lists.

        Raises:
            Damaged: the budget is spent, or there is something else in it.
        """
        self._values -= 1
        if depth > NESTED_VALUES or self._values < 0:
            raise DamagedFile("it is nested too deeply")
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, dict) and all(isinstance(key, (str, int)) for key in value):
            return {key: self.copy(inner, depth + 1) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.copy(inner, depth + 1) for inner in value]
        if value is None or isinstance(value, (str, int, float)):
            return value
        raise DamagedFile(f"it holds a {type(value).__name__}")

    def _tensor(self, tensor: Tensor) -> Tensor:
        self._bytes -= tensor.numel() * tensor.element_size()
        if self._bytes < 0:
            raise DamagedFile("its tensors claim to be larger than it is")
        if tensor.layout != torch.strided:
            raise DamagedFile("it holds a tensor of another kind")
        return tensor.detach().to("cpu", copy=True)
