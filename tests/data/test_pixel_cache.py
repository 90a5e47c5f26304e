"""Files are decoded once: whole or not at all, to the same bytes after any stop, and anew where something changed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cilnorm.data import decoding_pool, pixel_cache
from cilnorm.data.decoding import decode
from cilnorm.data.pixel_cache import entries, image_set, remove
from cilnorm.images import DatasetError, ImageFiles, ImageSet
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

SIZE = 8


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CILNORM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pixel_cache, "BLOCK_ROWS", 4)
    return tmp_path / "cache" / "pixels"


@pytest.fixture
def files(tmp_path: Path) -> ImageFiles:
    """Two classes of five training and two test images each."""
    random, root = np.random.default_rng(0), tmp_path / "photographs"
    pairs: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    for split, count in (("train", 5), ("test", 2)):
        for label, name in enumerate("ab"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                path = f"{split}/{name}/{number}.png"
                Image.fromarray(random.integers(0, 256, (12, 10, 3), np.uint8)).save(root / path)
                pairs[split].append((path, label))
    return ImageFiles("photographs", root, pairs["train"], pairs["test"], ("a", "b"), SIZE)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the blocks that were decoded."""
    made: list[int] = []
    original = pixel_cache.decoded

    def noting(blocks: Any, *rest: Any) -> Any:
        made.extend(blocks)
        return original(blocks, *rest)

    monkeypatch.setattr(pixel_cache, "decoded", noting)
    return made


def same(one: ImageSet, other: ImageSet) -> bool:
    tensors = ("train_images", "train_labels", "test_images", "test_labels")
    return one.digest == other.digest and all(torch.equal(getattr(one, t), getattr(other, t)) for t in tensors)


def rewrite(path: Path, data: bytes) -> None:
    """In a file of its own: the old one is still mapped."""
    path.unlink()
    path.write_bytes(data)


def place(cache: Path) -> Path:
    [found] = [path for path in cache.iterdir() if path.is_dir()]
    return found


def test_the_pixels_are_those_of_the_files_in_their_order(files: ImageFiles) -> None:
    made = image_set(files)
    for images, pairs in ((made.train_images, files.train), (made.test_images, files.test)):
        assert images.dtype == torch.uint8
        assert np.array_equal(images, [decode(files.root / path, SIZE) for path, _ in pairs])
    assert made.train_labels.tolist() == [0] * 5 + [1] * 5
    assert made.test_labels.tolist() == [0, 0, 1, 1]
    assert (made.class_names, made.mean, made.std, made.notice) == (("a", "b"), files.mean, files.std, "")
    assert made.train_labels.dtype == made.test_labels.dtype == torch.int64


def test_arrays_pass_through() -> None:
    from tests.fake import blobs

    arrays = blobs(None)
    assert image_set(arrays) is arrays


def test_what_is_there_is_not_decoded_again(files: ImageFiles, decoded: list[int]) -> None:
    first = image_set(files)
    assert decoded == [0, 1, 2, 3]
    assert same(image_set(files), first)
    assert decoded == [0, 1, 2, 3]


def test_the_file_is_mapped_and_never_written_to(files: ImageFiles, cache: Path) -> None:
    made = image_set(files)
    raw = (place(cache) / "pixels.raw").read_bytes()
    assert raw == torch.cat([made.train_images, made.test_images]).numpy().tobytes()
    if Path("/proc/self/maps").exists():
        assert "pixels.raw" in Path("/proc/self/maps").read_text()
    made.train_images.zero_()
    assert (place(cache) / "pixels.raw").read_bytes() == raw


def changed(files: ImageFiles) -> ImageFiles:
    path = files.root / files.train[3][0]
    Image.new("RGB", (9, 9), "red").save(path)
    return files


def touched(files: ImageFiles) -> ImageFiles:
    os.utime(files.root / files.test[0][0], ns=(1, 1))
    return files


CHANGES: dict[str, Callable[[ImageFiles], ImageFiles]] = {
    "another image": changed,
    "another time": touched,
    "another size": lambda files: replace(files, size=SIZE + 1),
    "another order": lambda files: replace(files, train=files.train[::-1]),
    "one less": lambda files: replace(files, train=files.train[1:]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_decides_the_pixels_makes_another_set(change: str, files: ImageFiles, decoded: list[int]) -> None:
    first = image_set(files)
    decoded.clear()
    second = image_set(CHANGES[change](files))
    assert decoded
    assert change == "another time" or second.digest != first.digest
    assert len(entries()) == 2


def test_another_decoder_makes_another_set(
    files: ImageFiles, decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    image_set(files)
    monkeypatch.setattr(pixel_cache, "decoder_version", lambda: "another")
    image_set(files)
    assert decoded == [0, 1, 2, 3] * 2


def test_labels_decide_the_digest_but_no_pixel(files: ImageFiles, decoded: list[int]) -> None:
    first = image_set(files)
    other = image_set(replace(files, train=[(path, 1 - label) for path, label in files.train]))
    assert other.digest != first.digest
    assert torch.equal(other.train_images, first.train_images)
    assert decoded == [0, 1, 2, 3]


def test_several_processes_make_the_same_bytes(
    files: ImageFiles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = image_set(files)
    monkeypatch.setenv("CILNORM_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(decoding_pool, "FEW", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert same(image_set(files), first)


def test_a_build_goes_on_after_a_kill(files: ImageFiles, cache: Path, tmp_path: Path, decoded: list[int]) -> None:
    """A process of its own is killed when the first blocks are noted; the next one decodes the rest alone."""
    code = f"""
import sys, time
from pathlib import Path
from cilnorm.data import decoding_pool, pixel_cache
from cilnorm.images import ImageFiles
pixel_cache.BLOCK_ROWS = 4
original = pixel_cache.decoded
def slow(*arguments):
    for number, made in enumerate(original(*arguments)):
        if number == 2:
            print("now", flush=True)
            time.sleep(600)
        yield made
pixel_cache.decoded = slow
train, test = {files.train!r}, {files.test!r}
pixel_cache.image_set(ImageFiles("photographs", Path({str(files.root)!r}), train, test, ("a", "b"), {SIZE}))
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"now\n"
        process.send_signal(signal.SIGKILL)
    part = place(cache)
    assert part.name.endswith(".part")
    assert [entry.complete for entry in entries()] == [False]
    made = image_set(files)
    assert decoded == [2, 3]
    assert np.array_equal(made.train_images, [decode(files.root / path, SIZE) for path, _ in files.train])
    assert not part.exists()
    assert [entry.complete for entry in entries()] == [True]


def test_blocks_whose_pixels_are_not_those_noted_are_decoded_again(
    files: ImageFiles, cache: Path, decoded: list[int]
) -> None:
    """As after a loss of power, when the note reached the disk and the pixels did not; the last note is cut short."""
    (files.root / files.test[3][0]).write_bytes(b"damaged")
    with pytest.raises(DatasetError):
        image_set(files)
    part = place(cache)
    with (part / "pixels.raw").open("r+b") as raw:
        raw.seek(4 * 3 * SIZE**2 + 5)
        raw.write(b"lost!")
    noted = (part / "journal.jsonl").read_text()
    (part / "journal.jsonl").write_text(noted[:-9])
    decoded.clear()
    made = image_set(replace(files, damaged="skip"))
    assert decoded == [1, 3]
    assert np.array_equal(made.train_images, [decode(files.root / path, SIZE) for path, _ in files.train])


@pytest.mark.parametrize("harm", ["flip", "cut", "index", "no index"])
def test_a_damaged_set_is_made_anew(harm: str, files: ImageFiles, cache: Path, decoded: list[int]) -> None:
    first = image_set(files)
    raw, index = place(cache) / "pixels.raw", place(cache) / "index.json"
    data = bytearray(raw.read_bytes())
    if harm == "flip":
        data[777] ^= 1
        rewrite(raw, data)
    elif harm == "cut":
        rewrite(raw, data[:-1])
    elif harm == "index":
        index.write_text(index.read_text()[:-20])
    else:
        index.unlink()
    decoded.clear()
    again = image_set(files)
    assert decoded == [0, 1, 2, 3]
    assert same(again, first)
    assert "was damaged, and was made anew" in again.notice
    assert image_set(files).notice == ""


def test_a_large_set_is_hashed_only_when_that_is_asked_for(
    files: ImageFiles, cache: Path, decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    image_set(files)
    monkeypatch.setattr(pixel_cache, "ALWAYS_VERIFIED", 100)
    raw = place(cache) / "pixels.raw"
    data = bytearray(raw.read_bytes())
    data[0] ^= 1
    rewrite(raw, data)
    decoded.clear()
    image_set(files)
    assert decoded == []
    image_set(files, verify=True)
    assert decoded == [0, 1, 2, 3]


@pytest.fixture
def with_damage(files: ImageFiles) -> ImageFiles:
    for path in (files.train[1][0], files.train[6][0], files.test[0][0]):
        (files.root / path).write_bytes(b"damaged")
    return files


def test_damaged_files_stop_the_build_which_names_them_all(with_damage: ImageFiles) -> None:
    for _ in range(2):
        with pytest.raises(DatasetError) as caught:
            image_set(with_damage)
        text = str(caught.value)
        assert text.startswith(f"photographs: 3 of 14 files in {with_damage.root} can't be decoded: train/a/1.png (")
        for words in ("(UnidentifiedImageError: ", "train/b/1.png", "test/a/0.png", "damaged=skip"):
            assert words in text
        assert "\n" not in text
    assert [entry.complete for entry in entries()] == [False]


def test_damaged_files_are_left_out_where_that_is_asked_for(with_damage: ImageFiles, decoded: list[int]) -> None:
    skipping = replace(with_damage, damaged="skip")
    made = image_set(skipping)
    left = [path for path, _ in skipping.train if path not in ("train/a/1.png", "train/b/1.png")]
    assert np.array_equal(made.train_images, [decode(skipping.root / path, SIZE) for path in left])
    assert made.train_labels.tolist() == [0] * 4 + [1] * 4
    assert np.array_equal(made.test_images, [decode(skipping.root / path, SIZE) for path, _ in skipping.test[1:]])
    assert made.test_labels.tolist() == [0, 1, 1]
    notice = "3 files that can't be decoded were left out: train/a/1.png, train/b/1.png, test/a/0.png"
    assert made.notice == notice
    decoded.clear()
    assert same(image_set(skipping), made)
    assert decoded == []
    with pytest.raises(DatasetError, match=r"can't be decoded: train/a/1\.png"):
        image_set(with_damage)  # what was left out once is not passed over in silence


def test_many_damaged_files_are_counted_and_some_named(files: ImageFiles) -> None:
    for path, _ in files.train:
        (files.root / path).write_bytes(b"damaged")
    with pytest.raises(DatasetError, match=r"10 of 14 files .*train/a/4\.png \(.*\); and 5 more\. Mend"):
        image_set(files)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_with_no_image_left_is_named(files: ImageFiles, split: str) -> None:
    for path, label in getattr(files, split):
        if label:
            (files.root / path).write_bytes(b"damaged")
    words = {"train": "no training image of b can be decoded", "test": "no test image of b can be decoded"}
    with pytest.raises(DatasetError, match=words[split]):
        image_set(replace(files, damaged="skip"))


@pytest.mark.parametrize("few", [0, 1000])
def test_a_file_that_can_not_be_read_is_no_damaged_one(
    files: ImageFiles, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes between the look at all files and their turn."""
    monkeypatch.setattr(decoding_pool, "FEW", few)
    make = pixel_cache._ImageCache._make
    gone = files.root / files.train[2][0]
    monkeypatch.setattr(pixel_cache._ImageCache, "_make", lambda self: gone.unlink() or make(self))
    with pytest.raises(DatasetError, match=rf"^{gone}: No such file"):
        image_set(replace(files, damaged="skip"))


def test_a_missing_file_is_named(files: ImageFiles) -> None:
    (files.root / files.train[2][0]).unlink()
    with pytest.raises(DatasetError, match=r"train/a/2\.png: cannot be read \(No such file"):
        image_set(files)


def test_a_process_that_is_brought_down_is_told_in_words(files: ImageFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding_pool, "FEW", 0)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(DatasetError, match=r"a decoding process ended while at work between t\w+/\w/\d\.png and t"):
        image_set(files)


def test_a_cache_that_can_not_be_written_names_the_way_out(
    files: ImageFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CILNORM_CACHE", str(tmp_path / "file"))
    with pytest.raises(DatasetError, match=r"Not a directory; CILNORM_CACHE names another"):
        image_set(files)


def test_a_full_disk_is_told_before_anything_is_decoded(
    files: ImageFiles, decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(DatasetError, match=r"photographs: its pixels need 0\.0 GB more in .*prepare --list"):
        image_set(files)
    assert decoded == []


def test_of_two_at_once_one_waits_and_decodes_nothing(files: ImageFiles, decoded: list[int], capfd: Any) -> None:
    import threading

    made: list[ImageSet] = []
    inside = threading.Event()
    original = pixel_cache.decoded

    def slow(*arguments: Any) -> Any:
        inside.set()
        time.sleep(0.5)
        yield from original(*arguments)

    pixel_cache.decoded, keep = slow, pixel_cache.decoded
    try:
        first = threading.Thread(target=lambda: made.append(image_set(files)))
        first.start()
        inside.wait()
        second = image_set(files)
        first.join()
    finally:
        pixel_cache.decoded = keep
    assert decoded == [0, 1, 2, 3]
    assert same(made[0], second)
    assert "waiting for another process at photographs-8-" in capfd.readouterr().err


def test_a_complete_set_needs_no_leave_to_write(files: ImageFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where somebody prepared it for a whole group."""
    first = image_set(files)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(pixel_cache, "_alone", refuse)
    assert same(image_set(files), first)
    with pytest.raises(DatasetError, match="Permission denied; CILNORM_CACHE"):
        image_set(replace(files, size=9))


def test_the_plugin_in_the_docs_is_complete(tmp_path: Path) -> None:
    from cilnorm.registry import load

    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "tutorials" / "your-data.md").read_text(), re.DOTALL)
    plugin = ModuleType("mine")
    exec(code, plugin.__dict__)
    for path in ("a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        Image.new("RGB", (70, 80), "red").save(tmp_path / path)
    made = image_set(load(extra=[plugin], strict=True).datasets["mine"].build(tmp_path))
    assert made.train_images.shape == (2, 3, 64, 64)
    assert made.test_labels.tolist() == [0, 1]


def test_sets_are_listed_and_removed_by_name(files: ImageFiles, cache: Path) -> None:
    image_set(files)
    image_set(replace(files, name="others"))
    image_set(replace(files, size=9))
    assert [(e.name, e.size, e.images, e.complete) for e in entries()] == [
        ("others", 8, 14, True),
        ("photographs", 8, 14, True),
        ("photographs", 9, 14, True),
    ]
    assert all(entry.bytes >= 14 * 3 * entry.size**2 for entry in entries())
    assert remove("nothing") == []
    one = entries()[1]
    assert [entry.path for entry in remove(one.path.name)] == [one.path]
    assert [(e.name, e.size) for e in entries()] == [("others", 8), ("photographs", 9)]
    remove("photographs")
    assert [e.name for e in entries()] == ["others"]


def test_an_index_tells_what_is_in_a_set(files: ImageFiles, cache: Path) -> None:
    image_set(files)
    index = json.loads((place(cache) / "index.json").read_text())
    assert index["root"] == str(files.root)
    assert "pillow" in index["decoder"]
    assert (index["images"], index["size"], index["left_out"]) == (14, 8, [])
