"""Files of images become what torchvision makes of them, in every form in which people keep them, or are refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision import transforms

from cilnorm.data.decoding import Undecodable, decode, decode_block

SIZE = 16


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))


def kept(tmp_path: Path, image: Image.Image, ending: str = "png", **options: Any) -> Path:
    path = tmp_path / f"image.{ending}"
    image.save(path, **options)
    return path


def expected(image: Image.Image, size: int = SIZE) -> np.ndarray:
    """What torchvision makes of an image in red, green and blue."""
    seen = transforms.CenterCrop(size)(transforms.Resize(size)(image))
    return np.asarray(seen).transpose(2, 0, 1)


@pytest.mark.parametrize(
    "sides", [(40, 30), (30, 41), (16, 16), (16, 37), (9, 12), (33, 33), (100, 17), (1, 1), (1, 3)]
)
def test_an_image_is_resized_and_cropped_as_torchvision_does_to_the_bit(tmp_path: Path, sides: tuple[int, int]) -> None:
    image = picture(*sides)
    made = decode(kept(tmp_path, image), SIZE)
    assert made.shape == (3, SIZE, SIZE)
    assert made.dtype == np.uint8
    assert np.array_equal(made, expected(image))


@pytest.mark.parametrize("ending", ["jpg", "png", "bmp", "gif", "webp", "tif", "ppm"])
def test_every_format_is_what_pillow_reads(tmp_path: Path, ending: str) -> None:
    path = kept(tmp_path, picture(), ending)
    assert np.array_equal(decode(path, SIZE), expected(Image.open(path).convert("RGB")))


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr"])
def test_other_colours_become_rgb(tmp_path: Path, mode: str) -> None:
    path = kept(tmp_path, picture().convert(mode), "jpg" if mode in ("CMYK", "YCbCr") else "png")
    made = decode(path, SIZE)
    assert np.array_equal(made, expected(Image.open(path).convert("RGB")))
    if mode in ("L", "1"):
        assert (made == made[:1]).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_lies_on_white(tmp_path: Path, mode: str) -> None:
    """Under full transparency any colour may stand; convert("RGB") would show it."""
    red = Image.new("RGBA", (20, 20), (255, 0, 0, 255))
    red.paste((0, 0, 0, 0), (0, 0, 20, 10))
    if mode == "P":
        image = Image.new("P", (20, 20), 1)
        image.putpalette([0, 0, 0, 255, 0, 0])
        image.paste(0, (0, 0, 20, 10))
        path = kept(tmp_path, image, transparency=0)
    else:
        path = kept(tmp_path, red.convert(mode))
    made = decode(path, 20)
    assert (made[:, :10] == 255).all()
    assert (made[0, 10:] == made[0, 19, 0]).all()
    assert (made[1, 10:] < 255).all()


def test_half_transparency_is_mixed_with_white(tmp_path: Path) -> None:
    made = decode(kept(tmp_path, Image.new("RGBA", (4, 4), (0, 0, 0, 128))), 4)
    assert abs(int(made[0, 0, 0]) - 127) <= 1


def test_grey_of_16_bits_is_scaled(tmp_path: Path) -> None:
    grey = np.linspace(0, 0xFFFF, 256).astype(np.uint16).reshape(16, 16)
    for ending in ("png", "tif"):
        made = decode(kept(tmp_path, Image.fromarray(grey), ending), 16)
        assert np.abs(made[1].astype(int) - grey / 257).max() <= 0.5


def test_grey_of_no_known_range_is_refused(tmp_path: Path) -> None:
    for array in (np.full((4, 4), 1 << 20, np.int32), np.full((4, 4), -1, np.int32), np.ones((4, 4), np.float32)):
        with pytest.raises(Undecodable, match="grey"):
            decode(kept(tmp_path, Image.fromarray(array), "tif"), 4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(tmp_path: Path, orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    path = kept(tmp_path, picture(20, 16), exif=exif)
    upright = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    assert np.array_equal(decode(path, SIZE), expected(upright))
    lying = expected(picture(20, 16))
    assert np.array_equal(decode(path, SIZE), lying) == (orientation == 1)


def test_damaged_exif_is_no_damage_to_the_image(tmp_path: Path) -> None:
    path = kept(tmp_path, picture(), "jpg", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xffrubbish", quality=95)
    assert np.array_equal(decode(path, SIZE), expected(Image.open(path).convert("RGB")))


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "tif"])
def test_of_an_animation_the_first_picture_counts(tmp_path: Path, ending: str) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue", "lime")]
    options: dict[str, Any] = {"lossless": True} if ending == "webp" else {}
    path = kept(tmp_path, frames[0], ending, save_all=True, append_images=frames[1:], **options)
    assert Image.open(path).n_frames == 3  # type: ignore[attr-defined]
    assert (decode(path, 4) == np.array([255, 0, 0]).reshape(3, 1, 1)).all()


@pytest.mark.parametrize("sides", [(1, 3000), (3000, 1), (2, 30000)])
def test_a_sliver_takes_little_more_memory_than_a_square(
    tmp_path: Path, sides: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *rest: made.append(size) or resize(self, size, *rest))
    pixels = decode(kept(tmp_path, Image.new("RGB", sides, (10, 20, 30))), 64)
    assert (pixels == np.array([10, 20, 30]).reshape(3, 1, 1)).all()
    assert [max(each) <= 8 * 64 for each in made] == [True]


def whole(ending: str) -> bytes:
    file = io.BytesIO()
    picture(200, 150).save(file, {"jpg": "jpeg"}.get(ending, ending))
    return file.getvalue()


DAMAGED = {
    "empty.jpg": b"",
    "text.png": b"not an image at all\n",
    **{f"cut.{ending}": whole(ending)[: len(whole(ending)) // 2] for ending in ("jpg", "png", "webp", "bmp", "gif")},
    "head.jpg": whole("jpg")[:20],
    "bomb.png": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x7f\xff\xff\xff\x7f\xff\xff\xff" + bytes([8, 2, *[0] * 7]),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_no_whole_image_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(DAMAGED[name])
    with pytest.raises(Undecodable) as caught:
        decode(tmp_path / name, SIZE)
    assert str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_not_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        decode(tmp_path / "gone.png", SIZE)


def test_a_block_goes_to_its_rows_and_names_the_damaged(tmp_path: Path) -> None:
    import hashlib

    picture(seed=1).save(tmp_path / "one.png")
    (tmp_path / "two.png").write_bytes(DAMAGED["cut.png"])
    picture(seed=3).save(tmp_path / "three.png")
    raw = tmp_path / "pixels"
    raw.write_bytes(bytes([7]) * 5 * 3 * SIZE**2)
    said = decode_block(raw, 1, str(tmp_path), ["one.png", "two.png", "three.png"], SIZE)
    rows = np.fromfile(raw, np.uint8).reshape(5, 3, SIZE, SIZE)
    assert (rows[[0, 4]] == 7).all()
    assert (rows[2] == 0).all()
    assert np.array_equal(rows[1], decode(tmp_path / "one.png", SIZE))
    assert np.array_equal(rows[3], decode(tmp_path / "three.png", SIZE))
    assert said["sha256"] == hashlib.sha256(rows[1:4].tobytes()).hexdigest()
    [[at, why]] = said["damaged"]
    assert at == 1
    assert why
