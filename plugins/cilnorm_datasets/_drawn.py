"""Data sets of 100 classes of 32x32 images that code draws: drawn when first asked for, kept, and checked when read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cilnorm.images import ImageSet

from ._files import cache_folder, digest, temporary
from ._sizes import averaged, check_size

__all__ = ["CLASSES", "SIDE", "Drawing"]

CLASSES, SIDE = 100, 32
PIXELS = 3 * SIDE * SIDE
DIGEST_BYTES = 32


@dataclass(frozen=True)
class Drawing:
    """How a set is drawn, and where it is kept.

    Attributes:
        name: of the set, and of its folder.
        recipe: stands in the name of the kept file; to be raised whenever the drawing changes.
        draw: takes class, split (0 training, 1 test), count and seed; gives the first ``count`` images of that class,
            (count, 3, 32, 32) uint8. More images change none of the first.
        class_names: of the 100 classes.
        mean, std: of each channel of the 50,000 training images of seed 0, scaled to [0, 1].
    """

    name: str
    recipe: int
    draw: Callable[[int, int, int, int], np.ndarray]
    class_names: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def place(self, root: Path | None, seed: int, train_per_class: int, test_per_class: int) -> Path:
        """The file in which a set is kept, below ``root`` or the cache folder."""
        name = f"recipe{self.recipe}-seed{seed}-{train_per_class}-{test_per_class}.raw"
        return (root or cache_folder()) / self.name / name

    def is_kept(self, root: Path | None) -> bool:
        """Whether the set of the usual size lies there."""
        return self.place(root, 0, 500, 100).is_file()

    def build(self, root: Path | None, seed: int, train_per_class: int, test_per_class: int, size: int) -> ImageSet:
        """The set, read from where it was kept, drawn where it was not, in both cases with 32x32 pixels, then averaged.

        Images stand class after class. A damaged file is drawn anew and a folder that cannot be written is done
        without; ``notice`` says so.

        Returns:
            Images (100 * train_per_class, 3, size, size) and (100 * test_per_class, 3, size, size), uint8.

        Raises:
            ValueError: a count below 1, a negative seed, or a size that does not divide 32.
        """
        check_size(self.name, SIDE, size)
        if min(train_per_class, test_per_class) < 1 or seed < 0:
            raise ValueError(
                f"{self.name} takes at least 1 image a class and a seed of at least 0;"
                f" asked for {train_per_class} and {test_per_class} images with seed {seed}"
            )
        counts = (train_per_class, test_per_class)
        path = self.place(root, seed, *counts)
        labels = [np.repeat(np.arange(CLASSES, dtype=np.int64), count) for count in counts]
        pixels, sha, notices = self._load(path, labels)
        if pixels is None:
            pixels = np.concatenate(
                [self.draw(label, split, count, seed) for split, count in enumerate(counts) for label in range(CLASSES)]
            )
            sha = _digest(pixels, labels)
            notices += self._keep(path, pixels, sha)
        if size < SIDE:
            pixels = averaged(pixels, size)
            sha = _digest(pixels, labels)
        images = torch.from_numpy(pixels).split([len(part) for part in labels])
        return ImageSet(
            train_images=images[0],
            train_labels=torch.from_numpy(labels[0]),
            test_images=images[1],
            test_labels=torch.from_numpy(labels[1]),
            class_names=self.class_names,
            mean=self.mean,
            std=self.std,
            digest=sha,
            notice="; ".join(notices),
        )

    def _load(self, path: Path, labels: list[np.ndarray]) -> tuple[np.ndarray | None, str, list[str]]:
        """The kept images, or None, with their digest and what there is to say about them.

        The file is nothing but the pixels and, behind them, their digest: there is no header that damage could turn
        into a demand for memory, and every flipped bit shows.
        """
        count = sum(map(len, labels))
        try:
            if path.stat().st_size == count * PIXELS + DIGEST_BYTES:
                raw = np.fromfile(path, np.uint8)
                pixels = raw[:-DIGEST_BYTES].reshape(count, 3, SIDE, SIDE)
                sha = _digest(pixels, labels)
                if raw[-DIGEST_BYTES:].tobytes() == bytes.fromhex(sha):
                    return pixels, sha, []
        except (FileNotFoundError, NotADirectoryError):
            return None, "", []
        except (OSError, ValueError) as error:  # ValueError: cut short between the two looks at it
            return None, "", [f"{path} could not be read ({error}); {self.name} was drawn anew"]
        return None, "", [f"{path} was damaged; {self.name} was drawn anew"]

    def _keep(self, path: Path, pixels: np.ndarray, sha: str) -> list[str]:
        """Write the file whole or not at all; two runs that do so at once write the same bytes."""
        try:
            with temporary(path) as part:
                with part.open("xb") as file:
                    file.write(pixels.data)
                    file.write(bytes.fromhex(sha))
                part.replace(path)
        except OSError as error:
            why = error.strerror or error
            return [f"{self.name} could not be kept as {path} ({why}) and will be drawn anew next time"]
        return []


def _digest(pixels: np.ndarray, labels: list[np.ndarray]) -> str:
    train = len(labels[0])
    return digest(pixels[:train], labels[0], pixels[train:], labels[1])
