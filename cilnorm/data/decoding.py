"""Image files as squares of uint8 pixels.

A file becomes what torchvision's ``Resize(size)`` and ``CenterCrop(size)`` make of it: the shorter side resized to
``size`` bilinearly with antialiasing, the centre square kept. Photographs are turned upright as their EXIF says, what
is transparent lies on white, grey of 16 bits is scaled to 8, of an animation the first picture counts.

The file is a program, too (``python -m cilnorm.data.decoding``): several processes decode side by side, and one
that a damaged file brings down takes nothing with it. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Undecodable", "decode", "decode_block", "decoder_version"]

RECIPE = 1  # to be raised whenever the same file would become other pixels
LONGEST = 8  # of a side, in shorter sides: what lies beyond is cut off before resizing, so that memory stays bounded
GREY_16 = ("I", "I;16", "I;16B", "I;16L", "I;16N")
WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
WHITE = (255, 255, 255, 255)


class Undecodable(ValueError):
    """A file that is no image, or a damaged one; the message says why, in one line."""


def decoder_version() -> str:
    """What the pixels of a file depend on, beside the file."""
    import PIL
    from PIL import features

    codecs = [f"{name} {features.version(name)}" for name in ("jpg", "webp", "jpg_2000", "avif", "libtiff")]
    return ", ".join([f"recipe {RECIPE}", f"pillow {PIL.__version__}", *codecs])


def decode(path: Path | str, size: int) -> np.ndarray:
    """The image in a file: (3, size, size) uint8.

    Raises:
        OSError: the file can't be read.
        Undecodable: it holds no whole image.
    """
    from PIL import Image, ImageOps

    with open(path, "rb") as file:
        raw = file.read()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd EXIF and large sizes; what can't be decoded raises
            with Image.open(io.BytesIO(raw)) as image:
                image.load()
                try:
                    upright = ImageOps.exif_transpose(image)
                except Exception:  # the EXIF is damaged, which says nothing of the pixels
                    upright = image
                pixels = np.asarray(_square(_rgb(upright), size))
    except Exception as error:  # a damaged file can make a decoder fail in any way
        raise Undecodable(" ".join(f"{type(error).__name__}: {error}".split())[:160]) from error
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _rgb(image: Image.Image) -> Image.Image:
    """The image in red, green and blue of 8 bits."""
    from PIL import Image

    if image.mode in GREY_16:
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 0xFFFF:
            raise ValueError("grey of more than 16 bits")
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("grey in floating-point numbers, of no known range")
    if image.mode in WITH_ALPHA or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image.convert("RGBA"))
    return image.convert("RGB")


def _square(image: Image.Image, size: int) -> Image.Image:
    """The shorter side resized to ``size``, then the centre, each rounded as torchvision does."""
    from PIL import Image

    width, height = image.size
    longest = LONGEST * min(width, height)
    if max(width, height) > longest:
        image = _centre(image, min(width, longest), min(height, longest))
        width, height = image.size
    if min(width, height) != size:
        sides = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
        image = image.resize(sides, Image.Resampling.BILINEAR)
    return _centre(image, size, size)


def _centre(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def decode_block(target: Path | str, first: int, root: str, files: Sequence[str], size: int) -> dict[str, Any]:
    """Decodes files into consecutive rows of a file of pixels; what can't be decoded leaves a black row.

    Args:
        target: the file, which exists.
        first: the row of the first file.
        root: what the files' paths are relative to.

    Returns:
        ``sha256``, hexadecimal, of the rows, and ``damaged``: [place in ``files``, why] of each such file.

    Raises:
        OSError: a file can't be read, or the pixels can't be written.
    """
    pixels, damaged = np.zeros((len(files), 3, size, size), np.uint8), []
    for at, name in enumerate(files):
        try:
            pixels[at] = decode(os.path.join(root, name), size)
        except Undecodable as error:
            damaged.append([at, str(error)])
    with open(target, "r+b") as file:
        file.seek(first * pixels[0].nbytes)
        file.write(pixels.data)
    return {"sha256": hashlib.sha256(pixels.data).hexdigest(), "damaged": damaged}


def main() -> None:
    """Decodes block after block: a line of JSON in, a line out, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches this process, too; the end of input ends it
    for line in sys.stdin:
        try:
            answer = decode_block(**json.loads(line))
        except OSError as error:
            answer = {"error": f"{error.filename or 'pixels'}: {error.strerror or error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
