"""Folders of images, one folder a class: where they are, what is in them, and what is not as it should be."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from cilnorm.images import DatasetError

__all__ = [
    "Damaged",
    "Links",
    "Listing",
    "Pairs",
    "count_classes",
    "folder_of",
    "has_folders",
    "list_classes",
    "pairs",
    "same_classes",
    "split_classes",
]

Damaged = Literal["stop", "skip"]
Links = Literal["stop", "follow"]
Listing = dict[str, list[str]]  # class -> paths of its images, relative to the root
Pairs = list[tuple[str, int]]  # (path, label)

# What people keep as images, whether or not it can be decoded here: a file in vain is named, not passed over.
ENDINGS = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif", ".heic", ".heif"),
}
NO_CLASSES = ("__MACOSX", "@eaDir")  # of archives made by macOS, and of network disks
NAMED = 3  # classes that a message names


def folder_of(root: Path | None, name: str, layout: str) -> Path:
    """The folder to look in: ``root``, else that of CILNORM_DATA.

    Raises:
        DatasetError: neither is given, or it is no folder.
    """
    place = root or (Path(os.environ["CILNORM_DATA"]) if os.environ.get("CILNORM_DATA") else None)
    if place is None:
        raise DatasetError(f"{name}: say with --data-root, or CILNORM_DATA, which folder has it; expected {layout}")
    if not os.path.isdir(place):
        raise DatasetError(f"{name}: {place} is no folder; expected {layout}")
    return place


def has_folders(path: Path) -> bool:
    """Whether there are folders in it that may be classes."""
    try:
        with os.scandir(path) as found:
            return any(entry.is_dir() and not entry.name.startswith(".") for entry in found)
    except OSError:
        return False


def list_classes(root: Path, folder: str, links: Links = "stop", only: Container[str] | None = None) -> Listing:
    """Classes in code-point order of their names, each with its images below ``root/folder``, sorted by path.

    Hidden files and folders, and files without an image's ending, are passed over. Folders inside a class belong to it.

    Args:
        links: what to do about links that leave the root.
        only: classes to be listed; all by default.

    Raises:
        DatasetError: a folder can't be read; a link leaves the root and ``links`` says stop; a link leads in a circle.
    """
    return {
        name: sorted(os.path.relpath(path, root).replace(os.sep, "/") for path in _images(root, here, links))
        for name, here in _folders(root, root / folder, links)
        if only is None or name in only
    }


def _folders(root: Path, folder: Path, links: Links) -> Iterator[tuple[str, Path]]:
    entries = [entry for entry in _entries(folder) if entry.name not in NO_CLASSES and entry.is_dir()]
    for entry in entries:
        if entry.is_symlink():
            _check_link(root, entry.path, links)
        yield entry.name, Path(entry.path)


def _images(root: Path, folder: Path, links: Links) -> Iterator[str]:
    for entry in _entries(folder):
        if entry.is_symlink():
            _check_link(root, entry.path, links)
        if entry.is_dir():
            yield from _images(root, Path(entry.path), links)
        elif os.path.splitext(entry.name)[1].lower() in ENDINGS:
            yield entry.path


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, by name, without the hidden."""
    try:
        with os.scandir(folder) as found:
            return sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise DatasetError(f"{folder}: cannot be read ({error.strerror})") from error


def _check_link(root: Path, path: str, links: Links) -> None:
    target, inside = os.path.realpath(path), os.path.realpath(root)
    if os.path.isdir(target) and f"{os.path.realpath(os.path.dirname(path))}/".startswith(f"{target}/"):
        raise DatasetError(f"{path}: a link to a folder that it is in")
    if links == "stop" and os.path.commonpath([target, inside]) != inside:
        raise DatasetError(f"{path}: a link that leaves {root}, to {target}; if that is meant: --set links=follow")


def count_classes(pairs: Pairs, classes: int) -> list[int]:
    """How many images each class has."""
    return np.bincount([label for _, label in pairs], minlength=classes).tolist()


def same_classes(one: Mapping[str, object], other: Iterable[str], where: str, elsewhere: str) -> None:
    """Holds two lists of classes against each other.

    Raises:
        DatasetError: they differ; says how.
    """
    here, there = set(one), set(other)
    if here != there:
        parts = [(here - there, f"only in {where}"), (there - here, f"only in {elsewhere}")]
        raise DatasetError("classes differ: " + "; ".join(f"{text}: {_some(names)}" for names, text in parts if names))


def _some(names: set[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(sorted(names)[:NAMED]) + more


def pairs(listing: Listing, names: Sequence[str], where: str) -> Pairs:
    """(path, label) of every image, class after class; a label is the place of the class in ``names``.

    Raises:
        DatasetError: a class has no image.
    """
    for name in names:
        if not listing[name]:
            raise DatasetError(f"{where}/{name} holds no image: no file that ends in .jpg, .png, .webp or the like")
    return [(path, label) for label, name in enumerate(names) for path in listing[name]]


def split_classes(listing: Listing, part: float, seed: int) -> tuple[Listing, Listing]:
    """Training and test images of every class, drawn from its images by seed and class name alone.

    At least one image of a class goes to either side.

    Raises:
        DatasetError: a part that is none, or a class with fewer than two images.
    """
    if not 0 < part < 1:
        raise DatasetError(f"the part of a class that is for testing must be in (0, 1), not {part}")
    train, test = {}, {}
    for name, paths in listing.items():
        if len(paths) < 2:
            raise DatasetError(f"{name} has {len(paths)} images; to be split for training and testing it needs 2")
        entropy = hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogateescape")).digest()
        order = np.random.default_rng(int.from_bytes(entropy, "big")).permutation(len(paths))
        count = min(max(1, round(part * len(paths))), len(paths) - 1)
        chosen = set(order[:count].tolist())
        train[name] = [path for at, path in enumerate(paths) if at not in chosen]
        test[name] = [path for at, path in enumerate(paths) if at in chosen]
    return train, test
