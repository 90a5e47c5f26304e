"""What the sources share: the cache folder, files that appear whole or not at all, digests, harmless pickles."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import pickletools
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["ArrayState", "cache_folder", "digest", "load_pickle", "temporary"]

OPCODES_LIMIT = 1_000_000  # a set of 50,000 images has two labels and a file name for each
TUPLES_LIMIT = 60  # beside the arguments of calls; a deep enough nest of them, hashed as a key, overflows the C stack


def cache_folder() -> Path:
    """The user's cache folder for this project; it need not exist yet."""
    import platformdirs

    return platformdirs.user_cache_path("cilnorm")


def digest(*arrays: np.ndarray) -> str:
    """SHA-256 of the arrays' bytes, one after the other, hexadecimal; they must be C-contiguous."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(array.data)
    return sha.hexdigest()


@contextlib.contextmanager
def temporary(target: Path) -> Iterator[Path]:
    """A name beside ``target`` that nobody else uses, so that what is made there can be renamed to ``target``.

    The parent folder is made. Whatever stands under the temporary name at the end is removed, file or folder.

    Raises:
        OSError: the parent folder cannot be made.
    """
    import shutil

    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        yield path
    finally:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def load_pickle(raw: bytes, *, trusted: bool = False) -> Any:
    """What a pickle holds, its arrays as ``ArrayState``, Python 2's strings as bytes.

    A pickle is a program that somebody else wrote. It runs here with stand-ins for the few names that arrays need, so
    that nothing of Python or numpy is within its reach. Unless ``trusted``, meaning that its author is known, it is
    first looked over for instructions that would only use up memory.

    Raises:
        Exception: of any kind, where the pickle is damaged or asks for anything else.
    """
    if not trusted:
        _look_over(raw)
    return _Unpickler(io.BytesIO(raw), encoding="bytes").load()


def _look_over(raw: bytes) -> None:
    """Refuse what would take far more memory than the file. Lengths that reach beyond its end fail here, too."""
    tuples, before = 0, ""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(raw)):
        name = opcode.name
        tuples += name.startswith("TUPLE")
        tuples -= name == "REDUCE" and before.startswith("TUPLE")  # the stand-ins look at what they are given
        if opcode.proto > 4 or name in ("DUP", "FROZENSET") or count > OPCODES_LIMIT or tuples > TUPLES_LIMIT:
            raise pickle.UnpicklingError(f"instruction {count}, {name}, is none that plain arrays and lists need")
        # The memo is a table as long as its largest index.
        if name.endswith("PUT") and not 0 <= (argument or 0) <= count:
            raise pickle.UnpicklingError(f"instruction {count}, {name}, would fill memory")
        if not name.endswith(("PUT", "MEMOIZE")):
            before = name


class ArrayState:
    """Stands in for an array: what a pickle says of it, not yet believed.

    Attributes:
        shape, fortran, data: as numpy pickles them: a tuple, whether columns come first, bytes.
        kind: the first argument of its dtype, such as "u1"; bytes from Python 2.
    """

    __slots__ = ("data", "fortran", "kind", "shape")

    def __init__(self) -> None:
        self.shape = self.kind = self.fortran = self.data = None

    def __setstate__(self, state: Any) -> None:
        _, self.shape, dtype, self.fortran, self.data = state
        self.kind = dtype.kind


class _Dtype:
    __slots__ = ("kind",)
    kind: str | bytes

    def __setstate__(self, state: Any) -> None:
        """Byte order and fields: numbers of one byte have none."""


def _reconstruct(array: Any, shape: Any, kind: Any) -> ArrayState:
    if not callable(array) or shape != (0,) or kind not in ("b", b"b"):
        raise pickle.UnpicklingError("an array of no known form")
    return ArrayState()


def _dtype(kind: Any, *flags: Any) -> _Dtype:
    if type(kind) not in (str, bytes) or not set(map(type, flags)) <= {int, bool}:
        raise pickle.UnpicklingError("a dtype of no known form")
    dtype = _Dtype()
    dtype.kind = kind
    return dtype


def _encode(text: Any, codec: Any) -> bytes:
    if type(text) is not str or codec not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError("bytes of no known form")
    return text.encode("latin1")


def _never_called() -> None:
    """Stands in for ``numpy.ndarray``, which is only ever handed to ``_reconstruct``."""


STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _never_called,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if (module, name) not in STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        stand_in = STAND_INS[module, name]
        # Wrapped anew each time: a pickle may set attributes on what it is given, and that must not outlive it.
        return lambda *arguments: stand_in(*arguments)
