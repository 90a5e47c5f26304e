"""ImageNet (ILSVRC 2012), and the two sets of 100 of its classes that are both called ImageNet-100.

https://www.image-net.org/challenges/LSVRC/2012/

``imagenet100-1993`` has 100 classes drawn by NumPy's seed 1993: LUCIR, Mnemonics, AANets, FOSTER, PyCIL.
``imagenet100-podnet`` has the first 100 in the order of WordNet ids: PODNet, AFC, DER, DyTox, BiC. They share nine
classes, and results on one say nothing of the other. ``lists/`` has both in the order in which those papers learn them,
which is what ``class_order: 1993`` makes of the sorted list; labels are places in the sorted list.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NoReturn

from cilnorm.hookspecs import Dataset, hookimpl
from cilnorm.images import DatasetError, ImageFiles

from ._folders import Damaged, Links, Listing, folder_of, has_folders, list_classes, pairs, same_classes

PAPER = "https://arxiv.org/abs/1409.0575"
LISTS = {
    "imagenet": "imagenet-wnids",
    "imagenet100-1993": "imagenet100-1993",
    "imagenet100-podnet": "imagenet100-podnet",
}
TRAIN_IMAGES = {"imagenet": 1_281_167, "imagenet100-1993": 128_856}  # of the other list no count is known for certain
PER_CLASS = 50  # validation images
LAYOUT = (
    "ROOT/train/WNID/*.JPEG and ROOT/val/WNID/*.JPEG, or val/*.JPEG with LOC_val_solution.csv or the devkit beside it"
)
PLACES = (".", "imagenet", "ILSVRC2012", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")
SOLUTION = "LOC_val_solution.csv"
TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
DEVKITS = (".", "ILSVRC2012_devkit_t12/data", "devkit/data", "data")


@cache
def wnids(name: str) -> tuple[str, ...]:
    """The WordNet ids of a set; those of the two ImageNet-100 in the order of learning."""
    path = Path(__file__).parent / "lists" / f"{LISTS[name]}.txt"
    return tuple(path.read_text(encoding="ascii").split())


def build(
    name: str, root: Path | None = None, *, size: int = 256, damaged: Damaged = "stop", links: Links = "stop"
) -> ImageFiles:
    """The set ``name``, from a folder of its own or from one of all of ImageNet.

    Args:
        size: side of the squares that are kept, see ``ImageFiles``; networks get crops of them.
        damaged: ``stop`` at files that can't be decoded, or ``skip`` them.
        links: ``stop`` at links that leave the root, or ``follow`` them.

    Raises:
        DatasetError: it is not there, or not complete.
    """
    top = folder_of(root, name, LAYOUT)
    folder = _place(top, name)
    if folder is None:
        raise DatasetError(f"{name}: no folder of classes in {top}/train; expected {LAYOUT}")
    known = sorted(wnids(name))
    train = list_classes(folder, "train", links, only=set(known))
    if set(train) != set(known):
        raise DatasetError(f"{name}: {_lacking(name, folder, train)}")
    test = _validation(folder, known, links)
    same_classes(train, test, "train/", "val/")
    files = ImageFiles(
        name, folder, pairs(train, known, f"{folder}/train"), pairs(test, known, f"{folder}/val"), tuple(known), size
    )
    counts, right = (len(files.train), len(files.test)), (TRAIN_IMAGES.get(name), PER_CLASS * len(known))
    odd = counts[1] != right[1] or (right[0] and counts[0] != right[0])
    notice = (
        f"{name}: {counts[0]} + {counts[1]} images; the official ones are {right[0] or '?'} + {right[1]}" if odd else ""
    )
    return ImageFiles(name, folder, files.train, files.test, files.class_names, size, damaged=damaged, notice=notice)


def _place(top: Path, name: str) -> Path | None:
    """Where ``train`` is, in or below the folder that was named."""
    return next((top / place for place in (*PLACES, name) if has_folders(top / place / "train")), None)


def _lacking(name: str, folder: Path, found: Listing) -> str:
    """What is wrong with the classes; it may be that they are another set's."""
    there = set(_class_names(folder))
    for other in LISTS:
        if other != name and there == set(wnids(other)):
            return f"{folder}/train has the classes of {other}, of which {len(found)} are in this one"
    lacks = sorted(set(wnids(name)) - set(found))
    return f"{folder}/train lacks {len(lacks)} of {len(wnids(name))} classes, {lacks[0]} first"


def _class_names(folder: Path) -> list[str]:
    """Names of the folders in ``train``."""
    return [path.name for path in (folder / "train").iterdir() if path.is_dir()]


def _validation(folder: Path, known: Sequence[str], links: Links) -> Listing:
    """Images of the validation set by class, from class folders or, where it is flat, by a list beside it."""
    if has_folders(folder / "val"):
        return list_classes(folder, "val", links, only=set(known))
    names = sorted(path.name for path in (folder / "val").glob("*.JPEG")) if (folder / "val").is_dir() else []
    if not names:
        raise DatasetError(f"imagenet: no images in {folder}/val; expected {LAYOUT}")
    shown = _solution(folder) or _ground_truth(folder)
    if not shown:
        raise DatasetError(
            f"imagenet: {folder}/val is flat, and no {SOLUTION}, nor {TRUTH} with {META}, says what it shows"
        )
    listing: Listing = {wnid: [] for wnid in known}
    for name in names:
        wnid = shown.get(name.removesuffix(".JPEG"))
        if wnid is None:
            raise DatasetError(f"imagenet: {folder}/val/{name} is in no list of what the images show")
        if wnid in listing:
            listing[wnid].append(f"val/{name}")
    return listing


def _above(folder: Path) -> Iterator[Path]:
    yield from (folder, *list(folder.absolute().parents)[:3])


def _solution(folder: Path) -> dict[str, str]:
    """Image name -> WordNet id, of Kaggle's copy."""
    for place in _above(folder):
        try:
            with (place / SOLUTION).open(newline="", encoding="utf-8") as file:
                return {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
        except FileNotFoundError:
            continue
        except (OSError, KeyError, IndexError, AttributeError, ValueError, csv.Error) as error:
            raise DatasetError(f"{place / SOLUTION}: not the list of Kaggle's copy ({type(error).__name__})") from error
    return {}


def _ground_truth(folder: Path) -> dict[str, str]:
    """Image name -> WordNet id, of the development kit, whose numbers are not the places of sorted ids."""
    for place in (above / inner for above in _above(folder) for inner in DEVKITS):
        if not ((place / TRUTH).is_file() and (place / META).is_file()):
            continue
        from scipy.io import loadmat

        try:
            synsets = loadmat(place / META, squeeze_me=True)["synsets"]
            numbers = dict(zip(map(int, synsets["ILSVRC2012_ID"]), map(str, synsets["WNID"]), strict=True))
            lines = (place / TRUTH).read_text(encoding="ascii").split()
            return {f"ILSVRC2012_val_{at:08d}": numbers[int(line)] for at, line in enumerate(lines, 1)}
        except Exception as error:  # a damaged Matlab file can fail in any way
            raise DatasetError(f"{place}: {META} or {TRUTH} is damaged ({type(error).__name__})") from error
    return {}


def ambiguous(root: Path | None = None) -> NoReturn:
    """Says that there are two.

    Raises:
        DatasetError: always.
    """
    raise DatasetError(
        "imagenet100 is two data sets: imagenet100-1993, 100 classes drawn by seed 1993 (LUCIR, FOSTER, PyCIL), and"
        " imagenet100-podnet, the first 100 WordNet ids (PODNet, AFC, DER, DyTox); say which"
    )


def _found(name: str, root: Path | None) -> bool:
    try:
        place = _place(folder_of(root, name, LAYOUT), name)
    except DatasetError:
        return False
    return place is not None and set(wnids(name)) <= set(_class_names(place))


@hookimpl
def cilnorm_datasets() -> list[Dataset]:
    sets = [Dataset(name, partial(build, name), PAPER, found=partial(_found, name)) for name in LISTS]
    return [*sets, Dataset("imagenet100", ambiguous)]
