"""Augmentation in bulk against torchvision, one image at a time and with the same parameters."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import ColorJitter, RandomCrop, RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from cilnorm.training.pixels import Augmentation, Pixels, Views, resampling

MEAN, STD = (0.5071, 0.4866, 0.4409), (0.2009, 0.1984, 0.2023)


def noise(count: int = 16, height: int = 32, width: int = 32) -> Tensor:
    return torch.randint(
        0, 256, (count, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(3)
    )


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(images: Tensor, **augmentation: object) -> Pixels:
    """Images handed out in [0, 1], not normalised."""
    return Pixels(images, (0.0,) * 3, (1.0,) * 3, Augmentation(**augmentation))  # type: ignore[arg-type]


def one_at_a_time(images: Tensor, views: Views, pad: int) -> Tensor:
    """What torchvision makes of float images with these parameters."""
    results = []
    for at, image in enumerate(images.float() / 255):
        top, left, height, width = (int(part[at]) for part in (views.top, views.left, views.height, views.width))
        size = list(image.shape[1:])
        seen = tv.resized_crop(tv.pad(image, pad), top, left, height, width, size, antialias=True)
        seen = tv.horizontal_flip(seen) if views.flip[at] else seen
        results.append((seen * views.brightness[at]).clamp(0, 1))
    return torch.stack(results)


def test_clean_images_are_scaled_and_normalised() -> None:
    images = noise()
    clean = Pixels(images, MEAN, STD, Augmentation()).clean(torch.tensor([3, 0]))
    torch.testing.assert_close(clean, tv.normalize(images[[3, 0]].float() / 255, MEAN, STD), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pad", [0, 4])
def test_without_augmentation_nothing_happens(pad: int) -> None:
    images, indices = noise(), torch.arange(16)
    held = Pixels(images, MEAN, STD, Augmentation(pad=pad))
    views = held.draw(16, seeded())
    torch.testing.assert_close(held.augmented(indices, views), held.clean(indices), rtol=0, atol=1e-6)


def test_random_crop_is_torchvisions_to_the_bit() -> None:
    images = noise(64)
    held = pixels(images, pad=4, crop="random", flip=True)
    views = held.draw(64, seeded())
    padded = F.pad(images, (4, 4, 4, 4)).float() / 255
    for at, seen in enumerate(held.augmented(torch.arange(64), views)):
        window = tv.crop(padded[at], int(views.top[at]), int(views.left[at]), 32, 32)
        assert torch.equal(seen, tv.horizontal_flip(window) if views.flip[at] else window)


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (9, 7)])
@pytest.mark.parametrize("pad", [0, 4])
def test_resized_crop_flip_and_brightness_are_torchvisions(size: tuple[int, int], pad: int) -> None:
    images = noise(200, *size)
    held = pixels(images, pad=pad, crop="resized", flip=True, brightness=63 / 255)
    views = held.draw(200, seeded())
    seen = held.augmented(torch.arange(200), views)
    torch.testing.assert_close(seen, one_at_a_time(images, views, pad), rtol=0, atol=1e-5)


def test_resized_crop_is_within_rounding_of_pillows() -> None:
    images = noise(100)
    held = pixels(images, pad=4, crop="resized")
    views = held.draw(100, seeded())
    for at, seen in enumerate(held.augmented(torch.arange(100), views)):
        padded = tv.to_pil_image(tv.pad(images[at], 4))
        window = [int(part[at]) for part in (views.top, views.left, views.height, views.width)]
        expected = tv.pil_to_tensor(tv.resized_crop(padded, *window, [32, 32])).float() / 255
        assert (seen - expected).abs().max() <= 1.5 / 255


def test_random_crop_flip_and_brightness_are_within_rounding_of_pillows() -> None:
    """As the code of PODNet and AFC augments: whole images of bytes, one transform after another."""
    images = noise(100)
    held = pixels(images, pad=4, crop="random", flip=True, brightness=63 / 255)
    views = held.draw(100, seeded())
    for at, seen in enumerate(held.augmented(torch.arange(100), views)):
        image = tv.to_pil_image(tv.pad(images[at], 4))
        image = tv.crop(image, int(views.top[at]), int(views.left[at]), 32, 32)
        image = tv.horizontal_flip(image) if views.flip[at] else image
        expected = tv.pil_to_tensor(tv.adjust_brightness(image, float(views.brightness[at]))).float() / 255
        assert (seen - expected).abs().max() <= 1.001 / 255  # Pillow cuts to whole numbers


@given(st.integers(1, 48), st.integers(0, 6), st.data())
@settings(max_examples=60, deadline=None)
def test_resampling_weights_are_averages_of_the_window(size: int, pad: int, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, size + 2 * pad))
    start = data.draw(st.integers(0, size + 2 * pad - length))
    weights = resampling(torch.tensor([float(start)]), torch.tensor([float(length)]), size, pad)[0]
    assert weights.shape == (size, size)
    assert (weights >= 0).all()
    inside = torch.tensor([start <= at + pad < start + length for at in range(size)])
    assert (weights[:, ~inside] == 0).all()
    assert (weights.sum(1) <= 1 + 1e-5).all()
    if not pad:
        torch.testing.assert_close(weights.sum(1), torch.ones(size))


def windows(pad: int, size: tuple[int, int], count: int = 20000) -> Views:
    return Augmentation(pad=pad, crop="resized").draw(count, size, seeded())


@pytest.mark.parametrize("size", [(32, 32), (20, 60), (60, 20), (1, 1)])
def test_windows_lie_inside(size: tuple[int, int]) -> None:
    views = windows(4, size)
    for begin, length, side in zip((views.top, views.left), (views.height, views.width), size, strict=True):
        assert (begin >= 0).all()
        assert (length >= 1).all()
        assert (begin + length <= side + 8).all()
        assert torch.equal(begin, begin.round())
        assert torch.equal(length, length.round())


@pytest.mark.parametrize("size", [(40, 40), (20, 60), (60, 15)])
def test_windows_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    """Means and deviations of place, area and aspect; 4 standard errors of the difference."""
    torch.manual_seed(1)
    image = torch.empty(3, *size)
    theirs = torch.tensor(
        [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(5000)]
    ).float()
    drawn = windows(0, size)
    ours = torch.stack([drawn.top, drawn.left, drawn.height, drawn.width], dim=1)
    for one, other in zip(described(ours), described(theirs), strict=True):
        error = math.sqrt(one.var() / len(one) + other.var() / len(other))
        assert abs(one.mean() - other.mean()) <= 4 * error + 1e-6


def described(windows: Tensor) -> list[Tensor]:
    top, left, height, width = windows.unbind(1)
    area, aspect = height * width, (width / height).log()
    return [top, left, top * left, height, width, area, area.square(), aspect, aspect.square()]


@pytest.mark.parametrize("size", [(10, 400), (400, 10), (2, 300)])
def test_windows_that_never_fit_fall_back_to_the_centre(size: tuple[int, int]) -> None:
    views = windows(0, size, 500)
    torch.manual_seed(0)
    fallback = RandomResizedCrop.get_params(torch.empty(3, *size), [50.0, 50.0], [3 / 4, 4 / 3])  # no such area fits
    found = torch.stack([views.top, views.left, views.height, views.width], dim=1)
    assert (found == torch.tensor(fallback)).all()


@pytest.mark.parametrize("pad", [0, 4])
def test_random_crops_meet_every_place_about_equally_often(pad: int) -> None:
    places = 2 * pad + 1
    drawn = Augmentation(pad=pad, crop="random").draw(9000, (32, 32), seeded())
    theirs = {RandomCrop.get_params(torch.empty(3, 32 + 2 * pad, 32 + 2 * pad), (32, 32)) for _ in range(2000)}
    assert {int(top) for top, *_ in theirs} <= set(range(places))
    counts = (drawn.top * places + drawn.left).long().bincount(minlength=places**2)
    assert len(counts) == places**2
    assert (counts - 9000 / places**2).abs().max() <= 5 * math.sqrt(9000 / places**2)


def test_half_of_the_images_are_flipped_and_none_without_flip() -> None:
    assert abs(Augmentation(flip=True).draw(10000, (8, 8), seeded()).flip.float().mean() - 0.5) < 0.02
    assert not Augmentation().draw(1000, (8, 8), seeded()).flip.any()


@pytest.mark.parametrize("brightness", [0.0, 63 / 255, 1.5])
def test_brightness_spans_color_jitters_range(brightness: float) -> None:
    low, high = ColorJitter(brightness=brightness).brightness or (1.0, 1.0)
    factors = Augmentation(brightness=brightness).draw(20000, (8, 8), seeded()).brightness
    assert factors.min() == pytest.approx(low, abs=1e-3)
    assert factors.max() == pytest.approx(high, abs=1e-3)


@pytest.mark.parametrize("crop", ["none", "random", "resized"])
def test_the_same_seed_draws_the_same_views(crop: str) -> None:
    augmentation = Augmentation(pad=2, crop=crop, flip=True, brightness=0.2)  # type: ignore[arg-type]
    one, same, other = (augmentation.draw(50, (8, 8), seeded(seed)) for seed in (1, 1, 2))
    for name in ("top", "left", "height", "width", "flip", "brightness"):
        assert torch.equal(getattr(one, name), getattr(same, name))
    assert not torch.equal(one.brightness, other.brightness)


def test_views_of_some_rows() -> None:
    views = Augmentation(pad=2, crop="random").draw(10, (8, 8), seeded())
    some = views[torch.tensor([7, 7, 1])].to(torch.device("cpu"))
    assert some.top.tolist() == [views.top[at].item() for at in (7, 7, 1)]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_batches_have_the_layout_asked_for(layout: torch.memory_format) -> None:
    held = Pixels(noise(), MEAN, STD, Augmentation(pad=1, crop="random"), layout == torch.channels_last)
    indices = torch.arange(4)
    for batch in (held.clean(indices), held.augmented(indices, held.draw(4, seeded()))):
        assert batch.is_contiguous(memory_format=layout)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "centre"}, "no crop called 'centre'; there are none, random, resized"),
        ({"pad": -1}, "can't be negative"),
        ({"brightness": -0.1}, "can't be negative"),
    ],
)
def test_what_an_augmentation_can_not_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)  # type: ignore[arg-type]


# --- what the network is given has another size than what is stored --------------------------------------------------


def resized_at_a_time(images: Tensor, views: Views, pad: int, size: int) -> Tensor:
    """What torchvision makes of float images with these parameters."""
    results = []
    for at, image in enumerate(images.float() / 255):
        window = [int(part[at]) for part in (views.top, views.left, views.height, views.width)]
        seen = tv.resized_crop(tv.pad(image, pad), *window, [size, size], antialias=True)
        seen = tv.horizontal_flip(seen) if views.flip[at] else seen
        results.append((seen * views.brightness[at]).clamp(0, 1))
    return torch.stack(results)


@pytest.mark.parametrize("crop", ["none", "random", "resized"])
@pytest.mark.parametrize("size", [28, 20, 9])
def test_training_crops_of_another_size_are_torchvisions(crop: str, size: int) -> None:
    images = noise(64)
    held = pixels(images, pad=2, crop=crop, crop_size=size, flip=True, brightness=63 / 255)
    views = held.draw(64, seeded())
    seen = held.augmented(torch.arange(64), views)
    assert seen.shape == (64, 3, size, size)
    torch.testing.assert_close(seen, resized_at_a_time(images, views, 2, size), rtol=0, atol=1e-5)
    if crop == "random":
        assert {int(top) for top in views.top} == set(range(32 + 4 - size + 1)) or size == 9
        assert (views.height == size).all()


@pytest.mark.parametrize("crop_size", [32, 28, 27, 8])
@pytest.mark.parametrize("test_size", [None, 32, 36, 40])
def test_testing_is_torchvisions_resize_and_centre_crop(crop_size: int, test_size: int | None) -> None:
    images = noise(32)
    seen = pixels(images, crop_size=crop_size, test_size=test_size).clean(torch.arange(32))
    resized = tv.resize(images.float() / 255, [test_size or 32, test_size or 32], antialias=True)
    torch.testing.assert_close(seen, tv.center_crop(resized, [crop_size, crop_size]), rtol=0, atol=1e-5)


def test_a_centre_without_resizing_is_cut_out_to_the_bit() -> None:
    images = noise(8)
    seen = pixels(images, crop_size=28).clean(torch.arange(8))
    assert torch.equal(seen, images[:, :, 2:30, 2:30].float() / 255)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_size": 0}, "at least 1"),
        ({"test_size": -1}, "at least 1"),
        (
            {"crop": "random", "crop_size": 37, "pad": 2, "test_size": 40},
            "no random crop of 37 pixels fits images of 32",
        ),
        ({"crop_size": 33}, "images of 32 pixels have no centre of 33; set test_size"),
        ({"crop_size": 30, "test_size": 29}, "images of 29 pixels have no centre of 30"),
    ],
)
def test_sizes_that_do_not_fit(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pixels(noise(1), **options)
