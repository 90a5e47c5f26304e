"""A folder of one's own images: ``ROOT/{train,test}/CLASS/*``, or ``ROOT/CLASS/*``, which is split here.

Labels are the places of the class names in code-point order, so "class10" comes before "class2" and capitals before
small letters. Photographs that show the same thing a moment later are no test of what was learned: give them a folder
of their own rather than let a split draw some for either side.
"""

from __future__ import annotations

import os
from pathlib import Path

from cilnorm.hookspecs import Dataset, hookimpl
from cilnorm.images import DatasetError, ImageFiles

from ._folders import Damaged, Links, Pairs, folder_of, has_folders, list_classes, pairs, same_classes, split_classes

LAYOUT = "ROOT/train/CLASS/* beside ROOT/test/CLASS/* or ROOT/val/CLASS/*, or ROOT/CLASS/* alone, two classes or more"
TESTS = ("test", "val", "valid", "validation")  # the first that has folders is the test set


def build(
    root: Path | None = None,
    *,
    size: int = 64,
    test_part: float = 0.2,
    split_seed: int = 0,
    damaged: Damaged = "stop",
    links: Links = "stop",
) -> ImageFiles:
    """The images below ``root``, or below the folder of CILNORM_DATA.

    Args:
        size: side of the squares that are kept and trained on, see ``ImageFiles``.
        test_part: which part of every class is for testing where there is no second folder.
        split_seed: of the draw of that part.
        damaged: ``stop`` at files that can't be decoded, or ``skip`` them.
        links: ``stop`` at links that leave the root, or ``follow`` them.

    Raises:
        DatasetError: the folder is not as it should be; says where, and what was expected.
    """
    folder = folder_of(root, "imagefolder", LAYOUT)
    train, test, names, notice = _splits(folder, test_part, split_seed, links)
    return ImageFiles("imagefolder", folder, train, test, names, size, damaged=damaged, notice=notice)


def _splits(folder: Path, part: float, seed: int, links: Links) -> tuple[Pairs, Pairs, tuple[str, ...], str]:
    """Training and test images, the classes' names, and what there is to say about the choice."""
    second = [name for name in TESTS if has_folders(folder / name)]
    notice = ""
    if has_folders(folder / "train"):
        listing, where = list_classes(folder, "train", links), f"{folder}/train"
    elif second:
        raise DatasetError(f"imagefolder: {folder} has {second[0]}/ but no train/; expected {LAYOUT}")
    else:
        listing, where = list_classes(folder, ".", links), str(folder)
    if len(listing) < 2:
        raise DatasetError(f"imagefolder: {where} has {len(listing)} folders of images; expected {LAYOUT}")
    names, there = tuple(listing), where
    pairs(listing, names, where)  # raises where a class is empty
    if where.endswith("/train") and second:
        held, there = list_classes(folder, second[0], links), f"{folder}/{second[0]}"
        same_classes(listing, held, "train/", f"{second[0]}/")
        notice = f"{there} is the test set; left alone: {', '.join(second[1:])}" if second[1:] else ""
    else:
        listing, held = split_classes(listing, part, seed)
    return pairs(listing, names, where), pairs(held, names, there), names, notice


def _found(root: Path | None) -> bool:
    place = root or Path(os.environ.get("CILNORM_DATA") or "/nowhere")
    return has_folders(place / "train")


@hookimpl
def cilnorm_datasets() -> list[Dataset]:
    return [Dataset("imagefolder", build, found=_found)]
