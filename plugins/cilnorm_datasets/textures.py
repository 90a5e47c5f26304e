"""The embedded data set ``textures``: a textured figure on a ground, in 100 classes, drawn when first asked for.

As in photographs, and unlike ``numerals``, what a class looks like shows in its statistics. Ten palettes, ten textures
and ten figures make the classes: class 10 p + t has palette p, texture t and figure (p + 3 t) mod 10. So two classes
share at most one of the three, and none tells the class alone. Colours, light, contrast, place, size and, by up to 30
degrees, both directions differ from image to image; little enough for ten classes to be learned from 60 images of each.

Measured on 60 images a class, means over the orders of classes of seeds 0 to 4: the mean colours of two of ten tasks
are 0.099 standard deviations of a pixel apart, those of two classes 0.331; on CIFAR-100 it is 0.105 and 0.328.

All is computed in integers (and square roots, which are exact), so every processor and NumPy draws the same bytes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cilnorm.hookspecs import Dataset, hookimpl
from cilnorm.images import ImageSet

from ._drawn import CLASSES, SIDE, Drawing

KINDS = 10
UNIT = 16  # places are in sixteenths of a pixel
# 256 cos and 256 sin of -30 to 30 degrees by 15: written out, for the last bit of a sine differs between processors.
COSINES = np.array([222, 247, 256, 247, 222], np.int32)
SINES = np.array([-128, -66, 0, 66, 128], np.int32)
JITTER = 60  # how far a channel of a colour may be from its palette's
LIGHT = 90  # how much lighter or darker an image may be, of 256
NOISE = 8
# Of the figure and of the ground, RGB. Greyish: as far apart as the colours of photographs.
PALETTES = np.array(
    [
        [[158, 102, 97], [107, 111, 104]],
        [[166, 137, 101], [119, 108, 100]],
        [[163, 158, 108], [111, 123, 135]],
        [[123, 149, 104], [127, 119, 107]],
        [[95, 125, 108], [134, 143, 139]],
        [[111, 149, 151], [99, 108, 123]],
        [[103, 114, 151], [142, 139, 127]],
        [[134, 110, 147], [115, 119, 115]],
        [[166, 129, 144], [127, 131, 143]],
        [[138, 133, 128], [103, 101, 104]],
    ],
    np.int32,
)
NAMES = ("red", "orange", "yellow", "green", "pine", "cyan", "blue", "violet", "pink", "grey")
TEXTURES = ("striped", "barred", "checked", "dotted", "ringed", "grained", "blotched", "zigzag", "netted", "shaded")


def build(
    root: Path | None = None, *, seed: int = 0, train_per_class: int = 500, test_per_class: int = 100, size: int = SIDE
) -> ImageSet:
    """The set, from ``<root or cache folder>/textures`` where it was kept, drawn (in seconds) where it was not.

    Images stand class after class. Image i of a class depends on ``seed``, the class, i and the split alone: a smaller
    set is the beginning of every class of a larger one. What becomes of damaged files and closed folders:
    ``Drawing.build``.

    Args:
        root: the folder to look in; None for the cache folder.
        seed: of all that is drawn.
        train_per_class, test_per_class: images drawn of each class.

        size: side of the images in pixels; a smaller one than 32, which it must divide, is made by averaging.

    Returns:
        train_images (100 * train_per_class, 3, size, size) and test_images (100 * test_per_class, ...), both uint8.

    Raises:
        ValueError: a count below 1, a negative seed, or a size that does not divide 32.
    """
    return DRAWING.build(root, seed, train_per_class, test_per_class, size)


def _draw(label: int, split: int, count: int, seed: int) -> np.ndarray:
    """The first ``count`` images of a class: (count, 3, 32, 32) uint8.

    Every stream yields its numbers image after image, so asking for more images changes none of the first.
    """
    palette, kind = divmod(label, KINDS)
    streams = np.random.SeedSequence((seed, split, label)).spawn(5)
    places, colours, texture_noise, ground_noise, grain = map(np.random.default_rng, streams)
    knobs = places.integers(0, 1 << 16, (count, 8, 1, 1), dtype=np.int32)
    paint = colours.integers(-128, 128, (count, 8, 1, 1), dtype=np.int32)
    x, y = (knobs[:, at] % (6 * UNIT) - 3 * UNIT for at in (0, 1))
    u, v = _turned(x, y, knobs[:, 2] % len(SINES))
    figure = _figure((palette + 3 * kind) % KINDS, u, v, 8 * UNIT + knobs[:, 3] % (3 * UNIT))[:, None]
    u, v = _turned(x + knobs[:, 4] % (8 * UNIT), y + knobs[:, 5] % (8 * UNIT), knobs[:, 6] % len(SINES))
    noise = texture_noise.integers(0, 256, (count, 17, 17), dtype=np.int32)
    depth = _texture(kind, u, v, 3 * UNIT + knobs[:, 7] % (2 * UNIT), noise)[:, None]
    shifts = paint[:, 1:7].reshape(count, 2, 3, 1, 1).swapaxes(0, 1) * JITTER // 128
    inner, outer = PALETTES[palette][:, None, :, None, None] + shifts
    contrast = 160 + paint[:, 7:] // 2  # of the texture, of 255
    unrest = _stretched(ground_noise.integers(0, 256, (count, 4, 4), dtype=np.int32), 3)[:, None]
    inside = inner * (255 - contrast + contrast * depth // 255) // 255
    image = np.where(figure, inside, outer * (176 + unrest * 80 // 255) // 255)
    image = image * (256 + paint[:, :1] * LIGHT // 128) // 256  # the light
    image += grain.integers(-NOISE, NOISE + 1, image.shape, dtype=np.int8)
    return image.clip(0, 255).astype(np.uint8)


def _turned(x: np.ndarray, y: np.ndarray, turn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of every pixel around (x, y), all (N, 1, 1), along axes that are turned: two (N, 32, 32)."""
    ramp = (np.arange(SIDE, dtype=np.int32) - SIDE // 2) * UNIT
    dx, dy, cosine, sine = ramp - x, ramp[:, None] - y, COSINES[turn], SINES[turn]
    return (cosine * dx + sine * dy) // 256, (cosine * dy - sine * dx) // 256


def _texture(kind: int, u: np.ndarray, v: np.ndarray, period: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """How light the figure's texture is at each place: (N, 32, 32) int32 of 0 .. 255.

    Args:
        u, v: coordinates (N, 32, 32).
        period: (N, 1, 1).
        noise: (N, 17, 17), of 0 .. 255.
    """
    wide = 2 * period
    match TEXTURES[kind]:
        case "striped":
            return _wave(u, period)
        case "barred":
            return _bars(u, wide)
        case "checked":
            return _bars(u, wide) ^ _bars(v, wide)
        case "dotted":
            return (((u % wide - period) ** 2 + (v % wide - period) ** 2) * 5 < 2 * period**2) * np.int32(255)
        case "ringed":
            return _wave(np.sqrt((u * u + v * v).astype(np.float64)).astype(np.int32), period)
        case "grained":
            return _stretched(noise, 16)
        case "blotched":
            return _stretched(noise[:, :5, :5], 4)
        case "zigzag":
            return _bars(u + _wave(v, wide) * period // 255, wide)
        case "netted":
            return (np.minimum(u % wide, v % wide) * 4 < period) * np.int32(255)
        case _:
            return ((u + 24 * UNIT) * 255 // (48 * UNIT)).clip(0, 255)


def _figure(kind: int, u: np.ndarray, v: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Where the figure lies, (N, 32, 32) bool, from coordinates (N, 32, 32) and sizes (N, 1, 1)."""
    a, b = abs(u), abs(v)
    square, farther, nearer, area = u * u + v * v, np.maximum(a, b), np.minimum(a, b), size * size
    match kind:
        case 0:  # disc
            return square < area
        case 1:  # square
            return farther < size * 7 // 8
        case 2:  # a square on its corner, cut off left and right
            return (a + b < size * 5 // 4) & (a < size)
        case 3:  # triangle
            return (v < size * 3 // 4) & (2 * a < v + size)
        case 4:  # cross
            return (nearer < size // 3) & (farther < size)
        case 5:  # ring
            return (square < area) & (square > area // 3)
        case 6:  # beam
            return (b < size * 2 // 5) & (a < size * 5 // 4)
        case 7:  # half a disc
            return (square < area) & (v > -size // 5)
        case 8:  # two discs
            return (a - size // 2) ** 2 + v * v < area // 4
        case _:  # four petals
            return (a + b < size * 4 // 3) & (farther < size * 9 // 10) & (a * b > area // 40)


def _wave(x: np.ndarray, period: np.ndarray) -> np.ndarray:
    """A triangle wave of 0 .. 255."""
    phase = x % period * 510 // period
    return np.minimum(phase, 510 - phase)


def _bars(x: np.ndarray, period: np.ndarray) -> np.ndarray:
    """0 in one half of the period and 255 in the other."""
    return (x % period * 2 < period) * np.int32(255)


def _stretched(noise: np.ndarray, cells: int) -> np.ndarray:
    """Noise (N, cells + 1, cells + 1), of 0 .. 255, between whose points is drawn straight: (N, 32, 32)."""
    at = np.arange(SIDE, dtype=np.int32) * cells * UNIT // SIDE
    low, part = at // UNIT, at % UNIT
    rows = noise[:, low] * (UNIT - part)[:, None] + noise[:, low + 1] * part[:, None]
    return (rows[:, :, low] * (UNIT - part) + rows[:, :, low + 1] * part) // UNIT**2


DRAWING = Drawing(
    "textures",
    recipe=2,
    draw=_draw,
    class_names=tuple(f"{TEXTURES[label % KINDS]} {NAMES[label // KINDS]}" for label in range(CLASSES)),
    mean=(0.3744, 0.3789, 0.3730),
    std=(0.1631, 0.1649, 0.1637),
)


@hookimpl
def cilnorm_datasets() -> list[Dataset]:
    return [Dataset("textures", build, found=DRAWING.is_kept, side=SIDE)]
