"""Images as the network is given them: cut, resized, mirrored and normalised on the device, batch by batch.

Padding, cropping, resizing and flipping are linear in the pixels and separable, so an augmented image is
``rows @ image @ columns.T`` with two small matrices an image. One code path serves every crop, with the antialiasing
that torchvision applies to PIL images, and no Python runs per image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cilnorm.training.streamed_images import StreamedImages

__all__ = ["Augmentation", "Pixels", "Views"]


@dataclass(frozen=True, eq=False)
class Views:
    """How each of n images is to be looked at; in pixels of the padded image.

    Attributes:
        top, left, height, width: (n,) the window that is resized to the image's own size.
        flip: (n,) bool, whether it is mirrored left to right.
        brightness: (n,) factor on pixels, clipped to the range of pixels afterwards.
    """

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    flip: Tensor
    brightness: Tensor

    def __getitem__(self, which: Tensor | int) -> Views:
        return self.each(lambda part: part[which])

    def to(self, device: torch.device) -> Views:
        """The same views on another device."""
        return self.each(lambda part: part.to(device))

    def copy_(self, other: Views) -> None:
        """Takes over as many other views, in the same memory."""
        for mine, theirs in zip(self.parts, other.parts, strict=True):
            mine.copy_(theirs)

    def each(self, change: Callable[[Tensor], Tensor]) -> Views:
        """``change`` made to every part."""
        return Views(*map(change, self.parts))

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The tensors, in the order of the attributes."""
        return self.top, self.left, self.height, self.width, self.flip, self.brightness


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training image; torchvision's distributions, drawn for many images at once.

    Attributes:
        pad: zero pixels added on each side before cropping.
        crop: ``none``: the whole image; ``random``: a window of ``crop_size`` (RandomCrop); ``resized``: a window of 8
            to 100 % of the area and aspect 3/4 to 4/3 (RandomResizedCrop). What has another size than ``crop_size`` is
            resized to it, bilinearly with antialiasing.
        crop_size: side of what the network is given, in training and testing; None for the images' own size.
        test_size: side that images are resized to for testing, before the centre of ``crop_size`` is cut out; None for
            their own. Of images decoded from files this is the stored square, so 256 stored, ``crop_size`` 224 and
            nothing here is what torchvision's ``Resize(256)`` and ``CenterCrop(224)`` make of the file.
        flip: mirror left to right with probability 1/2.
        brightness: the factor is uniform in [1 - b, 1 + b] (ColorJitter).
    """

    pad: int = 0
    crop: Literal["none", "random", "resized"] = "none"
    flip: bool = False
    brightness: float = 0.0
    crop_size: int | None = None
    test_size: int | None = None

    def __post_init__(self) -> None:
        if min(self.crop_size or 1, self.test_size or 1) < 1 or 0 in (self.crop_size, self.test_size):
            raise ValueError(f"crop_size and test_size are at least 1: {self}")
        if self.crop not in ("none", "random", "resized"):
            raise ValueError(f"no crop called {self.crop!r}; there are none, random, resized")
        if self.pad < 0 or self.brightness < 0:
            raise ValueError(f"pad and brightness can't be negative: {self}")

    def draw(self, count: int, size: tuple[int, int], generator: torch.Generator) -> Views:
        """Draws ``count`` views of images of ``size`` (height, width); same seed, same views."""
        height, width = (side + 2 * self.pad for side in size)
        given = self.given(size)
        uniform = torch.rand(count, 24, generator=generator, device=generator.device)
        if self.crop == "resized":
            window = _resized_windows(uniform[:, :22], height, width)
        elif self.crop == "random":
            top = (uniform[:, 0] * (height - given[0] + 1)).floor()
            left = (uniform[:, 1] * (width - given[1] + 1)).floor()
            window = (top, left, torch.full_like(top, given[0]), torch.full_like(left, given[1]))
        else:
            whole = torch.ones_like(uniform[:, 0])
            window = (whole * self.pad, whole * self.pad, whole * size[0], whole * size[1])
        flip = (uniform[:, 22] < 0.5) & self.flip
        brightness = 1 + (2 * uniform[:, 23] - 1) * self.brightness
        return Views(*window, flip, brightness.clamp(min=0))

    def given(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of what the network is given of images of ``size``."""
        return size if self.crop_size is None else (self.crop_size, self.crop_size)

    def check(self, size: tuple[int, int]) -> None:
        """Raises ValueError if images of ``size`` (height, width) are too small to be cut so."""
        given, tested = self.given(size), size if self.test_size is None else (self.test_size, self.test_size)
        if self.crop == "random" and any(g > side + 2 * self.pad for g, side in zip(given, size, strict=True)):
            raise ValueError(f"no random crop of {given[0]} pixels fits images of {min(size)} with a pad of {self.pad}")
        if any(g > side for g, side in zip(given, tested, strict=True)):
            raise ValueError(
                f"for testing, images of {min(tested)} pixels have no centre of {given[0]}; set test_size to as much"
            )


def _resized_windows(uniform: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """RandomResizedCrop's windows: ten proposals an image, the first that fits, else the centre.

    ``uniform`` is (n, 22): ten areas, ten aspects and a position.
    """
    area = height * width * (0.08 + (1 - 0.08) * uniform[:, :10])
    aspect = torch.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * uniform[:, 10:20])
    widths, heights = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = fits.to(torch.uint8).argmax(1, keepdim=True)
    w, h = widths.gather(1, first)[:, 0], heights.gather(1, first)[:, 0]
    fallback_w, fallback_h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    none = ~fits.any(1)
    w, h = torch.where(none, fallback_w, w), torch.where(none, fallback_h, h)
    top = torch.where(none, ((height - h) / 2).floor(), (uniform[:, 20] * (height - h + 1)).floor())
    left = torch.where(none, ((width - w) / 2).floor(), (uniform[:, 21] * (width - w + 1)).floor())
    return top, left, h, w


def resampling(start: Tensor, length: Tensor, size: int, pad: int, given: int | None = None) -> Tensor:
    """Weights (n, given, size) that make of a padded line its window [start, start + length), resized to ``given``.

    Bilinear with antialiasing, as PIL resizes: a triangle as wide as the window's pixels are, cut off at the window
    and normalised. Columns of padding are left out, since they are zero. ``given`` is ``size`` by default.
    """
    given = size if given is None else given
    scale = (length / given).view(-1, 1, 1)
    outputs = torch.arange(given, device=start.device).view(1, -1, 1)
    inputs = torch.arange(size + 2 * pad, device=start.device).view(1, 1, -1)
    begin, end = start.view(-1, 1, 1), (start + length).view(-1, 1, 1)
    centre = begin + (outputs + 0.5) * scale
    weights = (1 - (inputs + 0.5 - centre).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = weights * ((inputs >= begin) & (inputs < end))
    return (weights / weights.sum(-1, keepdim=True))[:, :, pad : pad + size]


class Pixels:
    """Images of one split, handed out on a device as normalised float batches.

    Args:
        images: (N, 3, H, W) uint8, on that device; or those that are read from elsewhere when they are needed.
        mean, std: per channel, of images scaled to [0, 1].
        augmentation: what ``augmented`` does; ``clean`` knows its sizes.
        channels_last: memory layout of the batches; convolutions on the CPU run up to twice as fast with it.

    Raises:
        ValueError: the images are too small for the augmentation's sizes.
    """

    def __init__(
        self,
        images: Tensor | StreamedImages,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        augmentation: Augmentation,
        channels_last: bool = True,
    ) -> None:
        self.images = images
        self.augmentation = augmentation
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self._mean = torch.tensor(mean, device=images.device).view(1, -1, 1, 1)
        self._std = torch.tensor(std, device=images.device).view(1, -1, 1, 1)
        augmentation.check((images.shape[2], images.shape[3]))
        self._centre = tuple(self._centred(side) for side in images.shape[2:]) if augmentation.crop_size else None

    def _centred(self, side: int) -> Tensor:
        """Weights (1, crop_size, side) of torchvision's Resize(test_size) and CenterCrop(crop_size)."""
        resized, given = self.augmentation.test_size or side, self.augmentation.crop_size or side
        whole = torch.tensor([0.0, side], device=self.images.device)
        first = round((resized - given) / 2)
        return resampling(whole[:1], whole[1:], side, 0, resized)[:, first : first + given]

    @property
    def device(self) -> torch.device:
        """Where batches are."""
        return self.images.device

    @property
    def streamed(self) -> bool:
        """Whether the images are elsewhere."""
        return isinstance(self.images, StreamedImages)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that are handed out."""
        channels, height, width = self.images.shape[1:]
        return (channels, *self.augmentation.given((height, width)))

    def draw(self, count: int, generator: torch.Generator) -> Views:
        """Views for ``count`` images."""
        return self.augmentation.draw(count, (self.images.shape[2], self.images.shape[3]), generator)

    def close(self) -> None:
        """Ends the thread that reads images, if there is one."""
        if isinstance(self.images, StreamedImages):
            self.images.close()

    def read(self, parts: Sequence[Tensor], into: Tensor | None = None) -> Iterator[Tensor]:
        """The images (n, 3, H, W) uint8 of each part, a tensor of indices; they are valid until the next are asked for.

        Args:
            into: a tensor of as many images, which takes each part in turn if they are read from elsewhere.
        """
        if isinstance(self.images, StreamedImages):
            return self.images.read(parts, into)
        return (self.images[part.to(self.device)] for part in parts)

    def clean(self, indices: Tensor) -> Tensor:
        """The images (n, 3, H, W) as they are, or their centre (n, 3, crop_size, crop_size), normalised."""
        return self._clean(self.images[indices])

    def clean_parts(self, parts: Sequence[Tensor]) -> Iterator[Tensor]:
        """``clean`` of each part, a tensor of indices."""
        return map(self._clean, self.read(parts))

    def _clean(self, images: Tensor) -> Tensor:
        pixels = images.to(self._mean.dtype) / 255
        if self._centre is not None:
            rows, columns = self._centre
            pixels = rows.unsqueeze(1) @ pixels @ columns.transpose(1, 2).unsqueeze(1)
        return self._normalised(pixels)

    def augmented(self, indices: Tensor, views: Views) -> Tensor:
        """The images (n, 3, H, W) as ``views`` sees them, H and W being crop_size where it is set, normalised."""
        return self.seen(self.images[indices], views)

    def seen(self, images: Tensor, views: Views) -> Tensor:
        """``augmented`` of images (n, 3, H, W) uint8 that were read before."""
        height, width = self.images.shape[2:]
        given = self.augmentation.given((height, width))
        pixels = images.to(self._mean.dtype) / 255
        rows = resampling(views.top, views.height, height, self.augmentation.pad, given[0])
        columns = resampling(views.left, views.width, width, self.augmentation.pad, given[1])
        columns = torch.where(views.flip.view(-1, 1, 1), columns.flip(1), columns)
        pixels = rows.unsqueeze(1) @ pixels @ columns.transpose(1, 2).unsqueeze(1)
        if self.augmentation.brightness:
            pixels = (pixels * views.brightness.view(-1, 1, 1, 1)).clamp(0, 1)
        return self._normalised(pixels)

    def _normalised(self, pixels: Tensor) -> Tensor:
        return ((pixels - self._mean) / self._std).contiguous(memory_format=self.layout)
