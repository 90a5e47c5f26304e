"""Tiny ImageNet: 200 classes of ImageNet at 64 x 64 pixels, 500 training and 50 validation images each.

http://cs231n.stanford.edu/tiny-imagenet-200.zip; the validation images are the test set, since the test images' classes
were never published. Labels are places in the sorted list of WordNet ids; other code numbers the lines of wnids.txt.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    same_classes,
)

CLASSES, PER_CLASS = 200, {"train": 500, "val": 50}
MEAN, STD = (0.4802, 0.4480, 0.3975), (0.2770, 0.2691, 0.2821)
FOLDER, NOTES = "tiny-imagenet-200", "val_annotations.txt"
LAYOUT = f"ROOT/{FOLDER}/ with train/WNID/images/*.JPEG, and val/images/*.JPEG with val/{NOTES} or val/WNID/*.JPEG"


def build(root: Path | None = None, *, size: int = 64, damaged: Damaged = "stop", links: Links = "stop") -> ImageFiles:
    """The set, from ``root`` or the folder ``tiny-imagenet-200`` in it.

    Args:
        size: side of the squares that are kept, see ``ImageFiles``.
        damaged: ``stop`` at files that can't be decoded, or ``skip`` them.
        links: ``stop`` at links that leave the root, or ``follow`` them.

    Raises:
        DatasetError: it is not there, or not complete.
    """
    folder = _place(folder_of(root, "tiny-imagenet", LAYOUT))
    if folder is None:
        raise DatasetError(f"tiny-imagenet: no folder of classes in {root}/train; expected {LAYOUT}")
    listing = list_classes(folder, "train", links)
    names = tuple(listing)
    if len(names) != CLASSES:
        raise DatasetError(f"tiny-imagenet: {folder}/train has {len(names)} classes, not {CLASSES}; expected {LAYOUT}")
    held = _annotated(folder, names) if (folder / "val" / NOTES).is_file() else list_classes(folder, "val", links)
    same_classes(listing, held, "train/", "val/")
    train, test = pairs(listing, names, f"{folder}/train"), pairs(held, names, f"{folder}/val")
    odd = [
        split
        for split, found in (("train", train), ("val", test))
        if set(count_classes(found, CLASSES)) != {PER_CLASS[split]}
    ]
    notice = f"{' and '.join(odd)} of {folder}: not the official number of images of every class" if odd else ""
    return ImageFiles("tiny-imagenet", folder, train, test, names, size, MEAN, STD, damaged, notice)


def _place(top: Path) -> Path | None:
    return next((place for place in (top / FOLDER, top) if has_folders(place / "train")), None)


def _annotated(folder: Path, names: Sequence[str]) -> Listing:
    """Validation images by class, as the file of notes says; those that somebody moved into class folders, too."""
    notes = folder / "val" / NOTES
    flat = (folder / "val" / "images").is_dir()
    if not flat:
        return list_classes(folder, "val")
    listing: Listing = {name: [] for name in names}
    try:
        lines = notes.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DatasetError(f"{notes}: cannot be read ({error})") from error
    for number, line in enumerate(lines, 1):
        image, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in listing or not image or Path(image).name != image:
            raise DatasetError(
                f"{notes}, line {number}: expected an image's name and a class of train/, with tabs between"
            )
        listing[wnid].append(f"val/images/{image}")
    return listing


def _found(root: Path | None) -> bool:
    try:
        place = _place(folder_of(root, "tiny-imagenet", LAYOUT))
    except DatasetError:
        return False
    return place is not None and (place / "wnids.txt").is_file()


@hookimpl
def cilnorm_datasets() -> list[Dataset]:
    return [Dataset("tiny-imagenet", build, found=_found)]
