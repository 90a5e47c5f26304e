"""What a data set promises: images of the said types and counts, the same every time, and sentences where they lack."""

from __future__ import annotations

import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cilnorm.hookspecs import Dataset
from cilnorm.images import DatasetError, ImageFiles, ImageSet
from cilnorm.testing import toys
from cilnorm.testing.checks import Broken, Check, NotChecked, wants

__all__ = ["dataset_checks"]

WHERE = "cilnorm.images.ImageSet and cilnorm.hookspecs.Dataset"
MOST = 200e6  # bytes of files that are copied to see what damage does
Work = Callable[[Dataset, Path | None], None]


@contextmanager
def offline() -> Iterator[None]:
    """Nothing is fetched by a check."""

    def refuse(*arguments: Any, **named: Any) -> Any:
        raise OSError("a check fetches nothing")

    before = socket.socket.connect
    socket.socket.connect = refuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        socket.socket.connect = before  # type: ignore[method-assign]


def built(record: Dataset, root: Path | None) -> ImageSet | ImageFiles:
    """The images.

    Raises:
        NotChecked: they are not here.
    """
    if record.found is not None and not record.found(root):
        raise NotChecked(f"the images are not in {root or 'the cache folder'}; name their folder with --data-root")
    with offline():
        try:
            found = record.build(root)
        except DatasetError as error:
            raise NotChecked(f"the images are not here: {error}") from error
    fine = isinstance(found, (ImageSet, ImageFiles))
    wants(fine, f"build returned a {type(found).__name__}; return an ImageSet or ImageFiles of cilnorm.images")
    return found


def types_and_counts(record: Dataset, root: Path | None) -> None:
    found = built(record, root)
    names = found.class_names
    wants(len(set(names)) == len(names) > 0, "class_names must be one name a class, none twice")
    for what in ("mean", "std"):
        value = getattr(found, what)
        fine = len(value) == 3 and all(0 < each < 1 for each in value)
        wants(fine, f"{what} is {value}; it is of images scaled to [0, 1], one number a channel")
    if isinstance(found, ImageFiles):
        for split, pairs in (("train", found.train), ("test", found.test)):
            labels = torch.tensor([label for _, label in pairs])
            _labels(split, labels, found.classes)
            lost = next((path for path, _ in pairs if not (found.root / path).is_file()), None)
            wants(lost is None, f"{split} names {lost}, which is no file in {found.root}")
        return
    for split, images, labels in (
        ("train", found.train_images, found.train_labels),
        ("test", found.test_images, found.test_labels),
    ):
        fine = images.dim() == 4 and images.shape[1] == 3 and images.dtype == torch.uint8
        wants(fine, f"{split}_images are {images.dtype} {tuple(images.shape)}; make them uint8 (N, 3, H, W)")
        fine = labels.shape == (len(images),) and labels.dtype == torch.int64
        wants(fine, f"{split}_labels are {labels.dtype} {tuple(labels.shape)}; make them int64 ({len(images)},)")
        _labels(split, labels, found.classes)


def _labels(split: str, labels: torch.Tensor, classes: int) -> None:
    wants(len(labels) > 0, f"there are no {split} images")
    low, high = int(labels.min()), int(labels.max())
    wants(low >= 0 and high < classes, f"{split} labels run from {low} to {high}, with {classes} class names")
    empty = (torch.bincount(labels, minlength=classes) == 0).nonzero().flatten().tolist()
    wants(not empty, f"the class {empty[:1]} has no {split} image")


def digest(record: Dataset, root: Path | None) -> None:
    """Resuming and comparing runs stand on it."""
    found = built(record, root)
    if isinstance(found, ImageFiles):
        return  # theirs is that of the decoded pixels
    said = "it is the SHA-256 of pixels and labels, as 64 hexadecimal digits, and says whether two runs saw the same"
    wants(re.fullmatch(r"[0-9a-f]{64}", found.digest) is not None, f"digest is {found.digest!r}; {said}")
    again = built(record, root)
    assert isinstance(again, ImageSet)
    same = found.digest == again.digest and torch.equal(found.train_images, again.train_images)
    wants(same, "two builds give other images or another digest; seed what is drawn")


def missing(record: Dataset, root: Path | None) -> None:
    """An empty folder: ``found`` is False, and ``build`` makes the images or says in one line what to do."""
    with tempfile.TemporaryDirectory() as folder, offline():
        empty = Path(folder)
        if record.found is not None:
            wants(not record.found(empty), "found is true for an empty folder")
        try:
            record.build(empty)
        except DatasetError as error:
            said = "the message for missing images must be one line that names the folder looked in"
            wants("\n" not in str(error) and folder in str(error), f"{said}; it is {str(error)[:200]!r}")
        except Exception as error:
            text = f"missing images end in {type(error).__name__}: {str(error)[:100]}"
            raise Broken(f"{text}; raise cilnorm.images.DatasetError with the layout that was expected") from error


def damaged(record: Dataset, root: Path | None) -> None:
    """Its largest file cut in half is an error, and no other set of images."""
    if root is None or not isinstance(built(record, root), ImageSet):
        raise NotChecked("there is no folder of files to damage")
    files = sorted((path for path in root.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    if not files or sum(path.stat().st_size for path in files) > MOST:
        raise NotChecked("there is no file to damage, or they are too large to copy")
    with tempfile.TemporaryDirectory() as folder, offline():
        copied = Path(shutil.copytree(root, Path(folder) / "copy"))
        victim = copied / files[-1].relative_to(root)
        victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
        try:
            record.build(copied)
        except DatasetError as error:
            said = f"the message for damage must name the file {victim.name}"
            wants(victim.name in str(error) or victim.parent.name in str(error), f"{said}; it is {str(error)[:200]!r}")
            return
        except Exception as error:
            text = f"a file cut in half ends in {type(error).__name__}: {str(error)[:100]}"
            raise Broken(f"{text}; raise cilnorm.images.DatasetError that names the file") from error
    raise Broken("a file cut in half was taken for whole; check sizes or a hash, and raise DatasetError")


def two_tasks(record: Dataset, root: Path | None) -> None:
    found = built(record, root)
    if isinstance(found, ImageFiles) or len(found.train_images) > 20_000:
        raise NotChecked("too many images for a quick run")
    classes = min(4, found.classes)
    registry = toys.registry_with("dataset", Dataset(record.name, lambda _, **options: found))
    result = toys.toy_run(registry, dataset=record.name, classes=classes, tasks=2, train_per_class=24)
    wants(len(result.matrix) == 2, "a run over two tasks did not end")


CHECKS: list[Work] = [types_and_counts, digest, missing, damaged, two_tasks]


def dataset_checks(record: Dataset, root: Path | None = None) -> Iterator[Check]:
    """The checks of a data set whose images are in ``root``, or in the user's cache folder."""

    def bound(work: Work) -> Callable[[Dataset], None]:
        return lambda checked: work(checked, root)

    for work in CHECKS:
        yield Check("dataset", record.name, work.__name__, bound(work), record, WHERE)
