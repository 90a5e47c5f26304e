"""The embedded data set ``numerals``: the two-digit numbers 00 to 99, drawn when first asked for.

A hundred classes of 32x32 colour images that need no download, so that a stream of class-incremental tasks can be seen
to work anywhere. A light number in the font that Pillow brings along stands on a darker ground; size, slant, weight,
place, colours, ground, scratches and noise differ from image to image, and none of them depends on the class. Numbers
have no mirror image: augment with crops (a pad-4 crop keeps 99.7 % of the ink), not with flips.

Measured: all classes trained jointly on the 50,000 images, a ResNet-8 (16, 32, 64 channels) reaches 90.8 % of the
10,000 test images after 2 epochs (SGD with momentum 0.9, batches of 128, one rate cycle up to 0.1, pad-4 crops). In 90
steps of 64 rows, ten classes with 100 images each, the same network reaches 26 % and 45 % in two
such tasks; chance is 10 %.

The same seed gives the same bytes: Pillow 10.1.0 with FreeType 2.13.2 and Pillow 13.0.0 with FreeType 2.14.3 agree.
Should another version draw a glyph differently, the set's digest tells.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cilnorm.hookspecs import Dataset, hookimpl
from cilnorm.images import ImageSet

from ._drawn import CLASSES, SIDE, Drawing

if TYPE_CHECKING:
    from PIL import Image

SCRATCHES = 2


def build(
    root: Path | None = None, *, seed: int = 0, train_per_class: int = 500, test_per_class: int = 100, size: int = SIDE
) -> ImageSet:
    """The set, from ``<root or cache folder>/numerals`` where it was kept, drawn (about ten seconds) where it was not.

    Images stand class after class. Image i of a class depends on ``seed``, the class, i and the split alone: a smaller
    set is the beginning of every class of a larger one. What becomes of damaged files and closed folders:
    ``Drawing.build``.

    Args:
        root: the folder to look in; None for the cache folder.
        seed: of all that is drawn.
        train_per_class, test_per_class: images drawn of each number.

        size: side of the images in pixels; a smaller one than 32, which it must divide, is made by averaging.

    Returns:
        train_images (100 * train_per_class, 3, size, size) and test_images (100 * test_per_class, ...), both uint8.

    Raises:
        ValueError: a count below 1, a negative seed, or a size that does not divide 32.
    """
    return DRAWING.build(root, seed, train_per_class, test_per_class, size)


def _draw(number: int, split: int, count: int, seed: int) -> np.ndarray:
    """The first ``count`` images of a class: (count, 3, 32, 32) uint8.

    Every stream yields its numbers image after image, so asking for more images changes none of the first.
    """
    shapes, colours, grain = map(np.random.default_rng, np.random.SeedSequence((seed, split, number)).spawn(3))
    numeral, scratches = _masks(f"{number:02d}", shapes.random((count, 7 + 4 * SCRATCHES)))
    paint = colours.integers(0, 256, (count, 17, 1, 1), dtype=np.int32)
    # Ink is always lighter than the ground, so that a demonstration of few steps has something to show.
    ground, far_ground, ink = paint[:, 0:3] * 130 // 255, paint[:, 3:6] * 130 // 255, 130 + paint[:, 6:9] * 125 // 255
    scratch, slope_x, slope_y = paint[:, 9:12], paint[:, 12:13], paint[:, 13:14]
    opacity = 64 + paint[:, 14:15] * 159 // 255
    # Most images are plain and a few are nearly unreadable: the first make learning quick, the others leave it room.
    noisiness, fading = 8 + _mostly_small(paint[:, 15:16]) * 100 // 255, _mostly_small(paint[:, 16:17]) * 225 // 255

    ramp = np.arange(SIDE, dtype=np.int32)
    image = _over(ground, far_ground, (slope_x * ramp + slope_y * ramp[:, None]) // (2 * SIDE - 2))
    image = _over(image, ink, numeral * (255 - fading) // 255)
    image = _over(image, scratch, scratches * opacity // 255)
    image += grain.integers(-64, 64, image.shape, dtype=np.int8) * noisiness // 64
    return image.clip(0, 255).astype(np.uint8)


def _mostly_small(uniform: np.ndarray) -> np.ndarray:
    """Bend 0 .. 255 so that half of the values are below an eighth of the range."""
    return uniform**3 // 255**2


def _over(below: np.ndarray, above: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Lay one colour over another; alpha runs from 0 to 255."""
    return below + (above - below) * alpha // 255


def _masks(text: str, knobs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the ink of the number and the scratches lie: two (N, 1, 32, 32) int32 of 0 .. 255.

    A row of knobs, all in [0, 1): weight of the pen, width, height, two slants, x, y, then the ends of the scratches.
    """
    from PIL import Image, ImageDraw

    glyphs = _glyphs(text)
    masks = np.empty((2, len(knobs), 1, SIDE, SIDE), np.int32)
    for row, (weight, width, height, lean, tilt, x, y, *ends) in enumerate(knobs.tolist()):
        # PIL asks where in the glyph's image, twice as large, a pixel comes from: [xx xy; yx yy] and the centre.
        xx, xy = 1.7 + 1.1 * width, 1.4 * (lean - 0.5)
        yx, yy = tilt - 0.5, 1.5 + 1.1 * height
        x, y = SIDE / 2 + 8 * (x - 0.5), SIDE / 2 + 8 * (y - 0.5)
        mapping = (xx, xy, SIDE - xx * x - xy * y, yx, yy, SIDE - yx * x - yy * y)
        glyph = glyphs[int(weight * len(glyphs))]
        ink = glyph.transform((SIDE, SIDE), Image.Transform.AFFINE, mapping, Image.Resampling.BILINEAR)
        sheet = Image.new("L", (SIDE, SIDE))
        draw = ImageDraw.Draw(sheet)
        for first in range(0, 4 * SCRATCHES, 4):
            draw.line([SIDE * end for end in ends[first : first + 4]], fill=255)
        masks[:, row, 0] = np.asarray(ink), np.asarray(sheet)
    return masks[0], masks[1]


def _glyphs(text: str) -> list[Image.Image]:
    """The number in three weights, in the middle of images of twice the side."""
    from PIL import Image, ImageDraw, ImageFilter, ImageFont

    glyph = Image.new("L", (2 * SIDE, 2 * SIDE))
    ImageDraw.Draw(glyph).text((SIDE, SIDE), text, 255, ImageFont.load_default(36), "mm")
    # Thickened here, because FreeType's own strokes (stroke_width) differ from version to version.
    return [glyph, glyph.filter(ImageFilter.MaxFilter(3)), glyph.filter(ImageFilter.MaxFilter(5))]


DRAWING = Drawing(
    "numerals",
    recipe=1,
    draw=_draw,
    class_names=tuple(f"{number:02d}" for number in range(CLASSES)),
    mean=(0.3077, 0.3067, 0.3090),
    std=(0.1999, 0.2003, 0.1998),
)


@hookimpl
def cilnorm_datasets() -> list[Dataset]:
    return [Dataset("numerals", build, found=DRAWING.is_kept, side=SIDE)]
