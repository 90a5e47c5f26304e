"""The order of classes as people give it: by a seed, as a list, in a file, or by the name of one that papers use."""

from __future__ import annotations

import functools
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from cilnorm.values import SpecError

__all__ = ["check_order", "given_order", "named_orders"]

SEEDS = 2**32  # as NumPy wants them
FILE_LIMIT = 1 << 20  # bytes; an order of 100,000 classes fits


def given_order(value: Any) -> Any:
    """What ``class_order`` means: a seed, or labels in the order of learning; None and what is no text as they are.

    Args:
        value: text is a seed (``1993``), labels with commas between them (``3,1,2``), a name in ``class_orders.txt``
            beside this module (``podnet-1``), or the path of a file with labels, separated by commas or white space;
            ``#`` begins a comment there.

    Raises:
        SpecError: the file can't be read, or holds other than labels.
    """
    if not isinstance(value, str):
        return value
    if re.fullmatch(r"\s*-?\d{1,10}\s*", value):
        return int(value)
    if re.fullmatch(r"[\s\d,]*,[\s\d,]*", value):
        return _labels(value, "class_order")
    if value.casefold() in named_orders():
        return list(named_orders()[value.casefold()])
    path = Path(value)
    try:
        if not path.is_file():
            raise SpecError(
                f"class_order: {value!r:.80} is neither a seed, nor a list such as 3,1,2, nor a file, nor {_names()}"
            )
        if path.stat().st_size > FILE_LIMIT:
            raise SpecError(f"class_order: {path} is longer than {FILE_LIMIT >> 10} KiB")
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        if isinstance(error, SpecError):
            raise
        raise SpecError(f"class_order: {value!r:.80}: {getattr(error, 'strerror', None) or 'no text'}") from error
    return _labels(re.sub(r"#.*", "", text), f"class_order: {path}")


@functools.cache
def named_orders() -> dict[str, tuple[int, ...]]:
    """Orders that papers use, by name: labels in the order of learning."""
    text = (files("cilnorm.settings") / "class_orders.txt").read_text(encoding="utf-8")
    parts = re.split(r"^([\w-]+):\n", re.sub(r"#.*", "", text), flags=re.M)[1:]
    return {name: tuple(_labels(labels, name)) for name, labels in zip(parts[::2], parts[1::2], strict=True)}


def _names() -> str:
    return " or ".join(named_orders())


def _labels(text: str, where: str) -> list[int]:
    words = re.sub(r"[\[\],]", " ", text).split()
    for word in words:
        if not re.fullmatch(r"\d{1,9}", word):
            raise SpecError(f"{where}: {word!r:.40} is no label; labels are 0, 1, 2, ...")
    return [int(word) for word in words]


def check_seed(seed: int, name: str) -> None:
    """Raises SpecError, which gives ``name``, if no order of classes can be drawn with this seed."""
    if not 0 <= seed < SEEDS:
        raise SpecError(f"{name}: a seed must be in [0, 2**32), as NumPy wants it, not {str(seed)[:40]}")


def check_order(order: int | tuple[int, ...] | None) -> None:
    """Raises SpecError if this can be the order of no data set's classes."""
    if isinstance(order, int):
        check_seed(order, "class_order")
        return
    if order is not None and not order:
        raise SpecError("class_order: a list of no labels")
    met = set[int]()
    for label in order or ():
        if label < 0:
            raise SpecError(f"class_order: {str(label)[:40]} is no label; labels are 0, 1, 2, ...")
        if label in met:
            raise SpecError(f"class_order: the label {label} stands there twice")
        met.add(label)
