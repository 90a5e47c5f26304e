"""mini-ImageNet: 100 classes of ImageNet, 600 training images each, at 84 x 84 pixels.

https://arxiv.org/abs/1606.04080. Its own split is by class (64, 16 and 20), which is of no use here: the 100 classes
are pooled, and each is split into 500 images to train and 100 to test on. Copies differ in which 100 those are. Where a
copy does not say, they are drawn by ``split_seed``; name the copy, or the seed, with any result.
"""

from __future__ import annotations

import csv
from pathlib import Path

from cilnorm.hookspecs import Dataset, hookimpl
from cilnorm.images import DatasetError, ImageFiles

from ._folders import (
    Damaged,
    Links,
    Listing,
    count_classes,
    folder_of,
    has_folders,
    list_classes,
    pairs,
    split_classes,
)

PAPER = "https://arxiv.org/abs/1606.04080"
CLASSES, TRAIN, TEST = 100, 500, 100  # the last two a class
MEAN, STD = (0.4731, 0.4491, 0.4038), (0.2729, 0.2656, 0.2795)
SPLITS = ("train", "val", "test")
LAYOUT = (
    "ROOT/train/CLASS/* and ROOT/val/CLASS/* or ROOT/test/CLASS/*, or ROOT/CLASS/*,"
    " or ROOT/images/* with train.csv, val.csv and test.csv"
)


def build(
    root: Path | None = None,
    *,
    size: int = 84,
    split_seed: int = 0,
    damaged: Damaged = "stop",
    links: Links = "stop",
) -> ImageFiles:
    """The set, from ``root`` or the folder ``mini-imagenet`` in it.

    Args:
        size: side of the squares that are kept, see ``ImageFiles``.
        split_seed: draws 100 test images of a class where the folders have no such split.
        damaged: ``stop`` at files that can't be decoded, or ``skip`` them.
        links: ``stop`` at links that leave the root, or ``follow`` them.

    Raises:
        DatasetError: it is not there, or not complete.
    """
    top = folder_of(root, "mini-imagenet", LAYOUT)
    folder = top / "mini-imagenet" if (top / "mini-imagenet").is_dir() else top
    parts = _tables(folder) or [list_classes(folder, split, links) for split in SPLITS if has_folders(folder / split)]
    if not parts:
        parts = [list_classes(folder, ".", links)]
    names = tuple(sorted(set().union(*parts)))
    if len(names) != CLASSES:
        raise DatasetError(f"mini-imagenet: {folder} has {len(names)} classes, not {CLASSES}; expected {LAYOUT}")
    train, test = _split(parts, split_seed)
    if set(train) != set(names) or set(test) != set(names):
        raise DatasetError(f"mini-imagenet: some classes are in one folder of {folder} and not in another; {LAYOUT}")
    one, other = pairs(train, names, str(folder)), pairs(test, names, str(folder))
    odd = {*count_classes(one, CLASSES)} != {TRAIN} or {*count_classes(other, CLASSES)} != {TEST}
    notice = f"mini-imagenet in {folder}: not {TRAIN} + {TEST} images of every class" if odd else ""
    return ImageFiles("mini-imagenet", folder, one, other, names, size, MEAN, STD, damaged, notice)


def _split(parts: list[Listing], seed: int) -> tuple[Listing, Listing]:
    """Training and test images: two folders of the same classes as they are, all else pooled and split by class."""
    if len(parts) == 2 and set(parts[0]) == set(parts[1]):
        return parts[0], parts[1]
    pooled: Listing = {}
    for part in parts:
        for name, paths in part.items():
            pooled.setdefault(name, []).extend(paths)
    return split_classes(pooled, TEST / (TRAIN + TEST), seed)


def _tables(folder: Path) -> list[Listing]:
    """What the three tables of the usual copy say, each with a line ``filename,label`` an image, if there are any."""
    found = [folder / f"{split}.csv" for split in SPLITS if (folder / f"{split}.csv").is_file()]
    parts = []
    for path in found:
        part: Listing = {}
        try:
            with path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    image, label = row["filename"], row["label"]
                    if not image or not label or Path(image).name != image:
                        raise ValueError
                    part.setdefault(label, []).append(f"images/{image}")
        except (OSError, KeyError, ValueError, TypeError, csv.Error) as error:
            raise DatasetError(f"{path}: expected lines filename,label with files of images/") from error
        parts.append(part)
    return parts


def _found(root: Path | None) -> bool:
    try:
        folder = folder_of(root, "mini-imagenet", LAYOUT)
    except DatasetError:
        return False
    return (folder / "mini-imagenet").is_dir()


@hookimpl
def cilnorm_datasets() -> list[Dataset]:
    return [Dataset("mini-imagenet", build, PAPER, found=_found)]
