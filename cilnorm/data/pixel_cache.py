"""Files of images decoded once: uint8 pixels in one memory-mapped file a data set and size, shared by all runs.

A set has a folder ``pixels/NAME-SIZE-KEY`` in the user's cache folder, or in that of CILNORM_CACHE. The key is a hash
of what decides the pixels: path, length and time of change of every file, in order, the size, and the decoder's
version. A file in whose place another of the same length and time of change was put is not noticed; all else is.

``pixels.raw`` is nothing but pixels. Blocks of rows are decoded by several processes, and each that is done is noted
with its SHA-256, so a build that was killed goes on where it was. The folder gets its name when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cilnorm.data.decoding import decoder_version
from cilnorm.data.decoding_pool import decoded
from cilnorm.files import write_atomically
from cilnorm.images import DatasetError, ImageFiles, ImageSet

try:
    import fcntl
except ImportError:  # Windows has no such locks; two builds of one set at a time are not kept apart there
    fcntl = None  # type: ignore[assignment]

__all__ = ["CacheEntry", "cache_folder", "entries", "image_set", "remove"]

PIXELS, INDEX, JOURNAL, UNFINISHED = "pixels.raw", "index.json", "journal.jsonl", ".part"
BLOCK_BYTES, BLOCK_ROWS = 16 << 20, 512  # a block is as many rows as fit the one, at most the other
ALWAYS_VERIFIED = 4 << 30  # a larger set is hashed by ``cilnorm prepare`` alone, for it takes a minute
NAMED = 5  # damaged files that a message names


@dataclass(frozen=True)
class CacheEntry:
    """A set of decoded images in the cache, ``size`` pixels a side; ``complete`` unless its making was cut short."""

    name: str
    size: int
    images: int
    bytes: int
    complete: bool
    path: Path


def cache_folder() -> Path:
    """Where sets are kept; it need not exist yet."""
    import platformdirs

    return Path(os.environ.get("CILNORM_CACHE") or platformdirs.user_cache_path("cilnorm")) / "pixels"


def image_set(source: ImageSet | ImageFiles, *, verify: bool = False) -> ImageSet:
    """The images as arrays; files are decoded unless that was done before, and their pixels stay on the disk.

    Args:
        verify: hash a set that is there already whatever its size.

    Raises:
        DatasetError: a file is missing, or damaged and not to be skipped; the cache can't be written, or is full.
    """
    if isinstance(source, ImageSet):
        return source
    if source.size < 1 or not source.train or not source.test:
        raise DatasetError(f"{source.name}: needs a size of at least 1, training images and test images")
    return _ImageCache(source).open(verify)


def entries() -> list[CacheEntry]:
    """Every set in the cache, by name; unfinished ones too."""
    folder, found = cache_folder(), []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not path.is_dir():
            continue
        known = _read_json(path / (INDEX if (path / INDEX).exists() else "about.json"))
        taken = sum(file.stat().st_blocks * 512 for file in path.iterdir() if file.is_file())
        name, size, images = known.get("name", path.name), known.get("size", 0), known.get("images", 0)
        found.append(CacheEntry(str(name), int(size), int(images), taken, not path.name.startswith("."), path))
    return found


def remove(name: str) -> list[CacheEntry]:
    """Removes every set of that name, or the one whose folder has it, and says which those were."""
    gone = [entry for entry in entries() if name in (entry.name, entry.path.name, entry.path.name.strip("."))]
    for entry in gone:
        shutil.rmtree(entry.path)
    return gone


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


class _ImageCache:
    """One data set in the cache, there or not."""

    def __init__(self, files: ImageFiles) -> None:
        self.files, self.names = files, [name for name, _ in (*files.train, *files.test)]
        self.row_bytes = 3 * files.size**2
        self.rows = max(1, min(BLOCK_ROWS, BLOCK_BYTES // self.row_bytes))
        label = f"{files.name}-{files.size}-{self._key()}"
        self.place = cache_folder() / label
        self.part = cache_folder() / f".{label}{UNFINISHED}"
        self.lock = cache_folder() / f".{label}.lock"

    def _key(self) -> str:
        """Sixteen hexadecimal digits of what decides the pixels."""
        sha = hashlib.sha256(f"{self.files.size}/{decoder_version()}".encode())
        root = os.fspath(self.files.root)
        for name in self.names:
            path = os.path.join(root, name)
            try:
                found = os.stat(path)
            except OSError as error:
                raise DatasetError(f"{path}: cannot be read ({error.strerror})") from error
            sha.update(f"\n{name}/{found.st_size}/{found.st_mtime_ns}".encode("utf-8", "surrogateescape"))
        return sha.hexdigest()[:16]

    def open(self, verify: bool) -> ImageSet:
        """The set, made first if it is not there, made anew if it is damaged."""
        notices = [self.files.notice]
        try:
            if not self._sound(verify):  # a complete set never changes, so it takes neither lock nor leave to write
                cache_folder().mkdir(parents=True, exist_ok=True)
                with _alone(self.lock):
                    if self.place.exists() and not self._sound(verify):
                        notices.append(f"{self.place} was damaged, and was made anew")
                        shutil.rmtree(self.place)
                    if not self.place.exists():
                        self._make()
        except OSError as error:
            raise DatasetError(
                f"{error.filename or self.place}: {error.strerror or error}; CILNORM_CACHE names another cache folder"
            ) from error
        return self._opened(notices)

    def _sound(self, verify: bool) -> bool:
        """Whether the file is as long as it was, and, where that is looked at, holds what it held."""
        index, path = _read_json(self.place / INDEX), self.place / PIXELS
        hashes = index.get("sha256")
        if not hashes or not path.is_file() or path.stat().st_size != index.get("images", 0) * self.row_bytes:
            return False
        if path.stat().st_size > ALWAYS_VERIFIED and not verify:
            return True
        return _hashes(path, self.rows * self.row_bytes) == hashes

    def _make(self) -> None:
        """Decodes what is not decoded yet, leaves out what can't be, and gives the folder its name."""
        self.part.mkdir(exist_ok=True)
        raw, whole = self.part / PIXELS, len(self.names) * self.row_bytes
        about = {"name": self.files.name, "size": self.files.size, "images": len(self.names)}
        write_atomically(self.part / "about.json", json.dumps(about))
        raw.touch()
        os.truncate(raw, whole)
        self._check_space(whole - raw.stat().st_blocks * 512)
        done = self._decode(raw, self._journal(raw))
        damaged = sorted((block * self.rows + at, why) for block, (_, found) in done.items() for at, why in found)
        if damaged and self.files.damaged == "stop":
            raise DatasetError(self._complaint(damaged))
        hashes = [done[block][0] for block in sorted(done)]
        if damaged:
            self._leave_out(raw, {row for row, _ in damaged})
            hashes = _hashes(raw, self.rows * self.row_bytes)
        index = {**about, "images": len(self.names) - len(damaged), "decoder": decoder_version(), "sha256": hashes}
        index |= {"root": os.fsdecode(self.files.root), "left_out": damaged, "made": time.strftime("%Y-%m-%d")}
        with raw.open("rb") as file:
            os.fsync(file.fileno())
        raw.chmod(0o444)  # runs have it mapped
        write_atomically(self.part / INDEX, json.dumps(index))
        (self.part / JOURNAL).unlink(missing_ok=True)
        self.part.replace(self.place)

    def _check_space(self, missing: int) -> None:
        free = shutil.disk_usage(self.part).free
        if missing > free:
            raise DatasetError(
                f"{self.files.name}: its pixels need {missing / 1e9:.1f} GB more in {cache_folder()}, where"
                f" {free / 1e9:.1f} GB are free; CILNORM_CACHE names another folder, `cilnorm prepare --list` shows"
                " what is there"
            )

    def _journal(self, raw: Path) -> dict[int, tuple[str, list[Any]]]:
        """Blocks that an earlier process finished, with hash and damaged files, as far as their pixels say so, too."""
        noted = {}
        try:
            lines = (self.part / JOURNAL).read_text().splitlines()
        except OSError:
            lines = []
        for line in lines:
            try:
                block, sha, damaged = json.loads(line)
                noted[int(block)] = str(sha), list(damaged)
            except (ValueError, TypeError):  # cut short by a kill
                continue
        found = _hashes(raw, self.rows * self.row_bytes, sorted(noted))
        return {block: noted[block] for block, sha in zip(sorted(noted), found, strict=True) if noted[block][0] == sha}

    def _decode(self, raw: Path, done: dict[int, tuple[str, list[Any]]]) -> dict[int, tuple[str, list[Any]]]:
        """Every block's hash and damaged files."""
        starts = {block: block * self.rows for block in range(-(-len(self.names) // self.rows)) if block not in done}
        common = {"target": os.fspath(raw), "root": os.fspath(self.files.root), "size": self.files.size}
        asked = {
            block: {**common, "first": first, "files": self.names[first : first + self.rows]}
            for block, first in starts.items()
        }
        with (self.part / JOURNAL).open("a") as journal:
            for block, answer in decoded(asked, len(self.names), self.files.name):
                done[block] = answer["sha256"], answer["damaged"]
                print(json.dumps([block, *done[block]]), file=journal, flush=True)
        return done

    def _complaint(self, damaged: Sequence[tuple[int, str]]) -> str:
        names = "; ".join(f"{self.names[row]} ({why})" for row, why in damaged[:NAMED])
        more = f"; and {len(damaged) - NAMED} more" if len(damaged) > NAMED else ""
        return (
            f"{self.files.name}: {len(damaged)} of {len(self.names)} files in {self.files.root} can't be decoded:"
            f" {names}{more}. Mend them, take them away, or go on without them: --set damaged=skip"
        )

    def _leave_out(self, raw: Path, rows: set[int]) -> None:
        """Closes the gaps that damaged files left; killed meanwhile, the blocks' hashes tell."""
        before = np.memmap(raw, np.uint8, "r").reshape(-1, self.row_bytes)
        kept = np.array([row for row in range(len(before)) if row not in rows])
        with raw.with_suffix(".kept").open("wb") as file:
            for some in np.array_split(kept, max(1, len(kept) // self.rows)):
                file.write(before[some].data)
        raw.with_suffix(".kept").replace(raw)

    def _opened(self, notices: list[str]) -> ImageSet:
        files, index = self.files, _read_json(self.place / INDEX)
        gone = {int(row): str(why) for row, why in index["left_out"]}
        if gone and files.damaged == "stop":
            raise DatasetError(self._complaint(sorted(gone.items())))
        if gone:
            some = [*(self.names[row] for row in sorted(gone)[:NAMED]), *["..."] * (len(gone) > NAMED)]
            notices.append(f"{len(gone)} files that can't be decoded were left out: {', '.join(some)}")
        pairs = (*files.train, *files.test)
        test = sum(row >= len(files.train) for row in range(len(pairs)) if row not in gone)
        labels = torch.tensor([label for row, (_, label) in enumerate(pairs) if row not in gone])
        pixels = _mapped(self.place / PIXELS, (len(labels), 3, files.size, files.size))
        train_labels, test_labels = labels[: len(labels) - test], labels[len(labels) - test :]
        for split, found in (("training", train_labels), ("test", test_labels)):
            empty = (torch.bincount(found, minlength=files.classes) == 0).nonzero()[:, 0].tolist()
            if empty:
                raise DatasetError(f"{files.name}: no {split} image of {files.class_names[empty[0]]} can be decoded")
        return ImageSet(
            train_images=pixels[: len(train_labels)],
            train_labels=train_labels,
            test_images=pixels[len(train_labels) :],
            test_labels=test_labels,
            class_names=files.class_names,
            mean=files.mean,
            std=files.std,
            digest=_digest(index["sha256"], train_labels, test_labels),
            notice="; ".join(filter(None, notices)),
            file=self.place / PIXELS,
        )


def _digest(hashes: Sequence[str], *labels: Tensor) -> str:
    """SHA-256 of the blocks' own and of the labels."""
    sha = hashlib.sha256("".join(hashes).encode())
    for part in labels:
        sha.update(part.numpy().tobytes())
    return sha.hexdigest()


def _mapped(path: Path, shape: tuple[int, ...]) -> Tensor:
    """A file's bytes as a tensor that reads them when asked; what is written to it stays in this process."""
    count = int(np.prod(shape))
    return torch.from_file(os.fspath(path), shared=False, size=count, dtype=torch.uint8).view(shape)


def _hashes(path: Path, block: int, which: Sequence[int] | None = None) -> list[str]:
    """SHA-256 of blocks of a file, all of them by default, several at a time."""
    if not path.stat().st_size:
        return []

    def one(at: int) -> str:
        with path.open("rb", buffering=0) as file:  # not through a map, whose pages count as the process's memory
            file.seek(at * block)
            return hashlib.sha256(file.read(block)).hexdigest()

    which = range(-(-path.stat().st_size // block)) if which is None else which
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(one, which))


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keeps other processes out of a set while it is looked at and made; waits for the one that is at work."""
    with path.open("a") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"cilnorm: waiting for another process at {path.name.strip('.')}", file=sys.stderr, flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
