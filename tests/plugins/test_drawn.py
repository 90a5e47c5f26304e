"""The embedded sets: always the same, balanced, and never lost to a bad cache."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from cilnorm_datasets import numerals, textures

pytestmark = pytest.mark.slow

SMALL = {"train_per_class": 3, "test_per_class": 2}


@pytest.fixture(params=[numerals, textures], ids=["numerals", "textures"])
def source(request):
    return request.param


@pytest.fixture
def kept_source():
    """Both are kept by the same code; this one is drawn sooner."""
    return textures


def folder(root, source):
    return root / source.DRAWING.name


def kept(root, source):
    (path,) = folder(root, source).iterdir()
    return path


def same(one, other):
    return one.digest == other.digest and torch.equal(one.train_images, other.train_images)


def test_shapes_and_balance(source, tmp_path):
    drawn = source.build(tmp_path, **SMALL)
    assert drawn.train_images.shape == (300, 3, 32, 32)
    assert drawn.test_images.shape == (200, 3, 32, 32)
    assert drawn.train_images.dtype == drawn.test_images.dtype == torch.uint8
    assert drawn.train_labels.dtype == drawn.test_labels.dtype == torch.int64
    assert drawn.train_labels.bincount().tolist() == [3] * 100
    assert drawn.test_labels.bincount().tolist() == [2] * 100
    assert drawn.class_names[7] == {"numerals": "07", "textures": "zigzag red"}[source.DRAWING.name]
    assert len(set(drawn.class_names)) == 100
    assert drawn.notice == ""


def test_smaller_images_are_means_of_squares(source, tmp_path):
    whole, small = source.build(tmp_path, **SMALL), source.build(tmp_path, size=16, **SMALL)
    squares = whole.train_images.view(300, 3, 16, 2, 16, 2).sum((3, 5), dtype=torch.int32)
    assert torch.equal(small.train_images, ((squares + 2) // 4).to(torch.uint8))
    assert small.test_images.shape == (200, 3, 16, 16)
    assert small.digest != whole.digest
    assert len(list((tmp_path / source.DRAWING.name).iterdir())) == 1  # drawn and kept once, for every size
    with pytest.raises(ValueError, match="size must divide that, 12 does not"):
        source.build(tmp_path, size=12)


def test_no_two_images_are_alike(source, tmp_path):
    drawn = source.build(tmp_path, **SMALL)
    images = torch.cat([drawn.train_images, drawn.test_images]).flatten(1)
    assert len(images.unique(dim=0)) == 500


def test_same_seed_same_bytes_and_another_seed_other_bytes(source, tmp_path):
    first = source.build(tmp_path / "a", **SMALL)
    assert same(first, source.build(tmp_path / "b", **SMALL))
    assert not same(first, source.build(tmp_path / "a", seed=1, **SMALL))


DRAWN = {
    "numerals": (1, "2e2f3e386c959c04772cf4d531c01ccee78e71389d9c20906c2e071c60be20f3"),
    "textures": (2, "1b4446ec1f5ed454e72a22c9695ad8e530b192fcbd2e34e21de075bd1dea3680"),
}


def test_the_drawing_is_what_it_was(source, tmp_path):
    """Where the drawing is changed on purpose, raise its recipe, or users keep the old files."""
    assert (source.DRAWING.recipe, source.build(tmp_path, **SMALL).digest) == DRAWN[source.DRAWING.name]


def test_a_smaller_set_begins_every_class_of_a_larger_one(source, tmp_path):
    small = source.build(tmp_path, train_per_class=2, test_per_class=1)
    large = source.build(tmp_path, train_per_class=5, test_per_class=3)
    assert torch.equal(small.train_images.view(100, 2, -1), large.train_images.view(100, 5, -1)[:, :2])
    assert torch.equal(small.test_images.view(100, 1, -1), large.test_images.view(100, 3, -1)[:, :1])


def test_colour_alone_hardly_tells_the_class(source, tmp_path):
    drawn = source.build(tmp_path, train_per_class=20, test_per_class=5)
    colours, asked = drawn.train_images.float().mean((2, 3)), drawn.test_images.float().mean((2, 3))
    nearest = torch.cdist(asked, colours.view(100, 20, 3).mean(1)).argmin(1)
    assert (nearest == drawn.test_labels).float().mean() < 0.04  # a hundredth would be chance


def test_tasks_of_textures_differ_in_colour_as_those_of_cifar100(tmp_path):
    """Mean colours of two tasks, in standard deviations of a pixel: 0.105 on CIFAR-100, over five orders of classes."""
    images = textures.build(tmp_path, train_per_class=20, test_per_class=1).train_images.float()
    of_class = images.view(100, 20, 3, -1).mean((1, 3)) / images.transpose(0, 1).flatten(1).std(1)
    orders = [torch.randperm(100, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
    tasks = torch.stack([of_class[order].view(10, 10, 3).mean(1) for order in orders])
    apart = (tasks[:, :, None] - tasks[:, None]).square().mean(-1).sqrt()
    assert 0.09 < apart.sum() / (5 * 90) < 0.13


def test_statistics_are_those_of_the_images(source, tmp_path):
    images = source.build(tmp_path, train_per_class=20, test_per_class=1).train_images.float() / 255
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.tensor(source.DRAWING.mean), atol=0.005, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3)), torch.tensor(source.DRAWING.std), atol=0.005, rtol=0)


def test_the_second_use_reads_what_the_first_kept(kept_source, tmp_path, monkeypatch):
    first = kept_source.build(tmp_path, **SMALL)
    monkeypatch.setattr(kept_source, "DRAWING", replace(kept_source.DRAWING, draw=lambda *_: pytest.fail("drew again")))
    again = kept_source.build(tmp_path, **SMALL)
    assert same(first, again)
    assert again.notice == ""


def flip(path, at):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip(path, 1000),
        lambda path: flip(path, -1),
        lambda path: os.truncate(path, 5000),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    ],
    ids=["pixel", "digest", "truncated", "empty", "longer"],
)
def test_a_damaged_file_is_drawn_anew(kept_source, tmp_path, damage):
    first = kept_source.build(tmp_path, **SMALL)
    intact = kept(tmp_path, kept_source).read_bytes()
    damage(kept(tmp_path, kept_source))
    again = kept_source.build(tmp_path, **SMALL)
    assert same(first, again)
    assert "damaged" in again.notice
    assert kept(tmp_path, kept_source).read_bytes() == intact
    assert kept_source.build(tmp_path, **SMALL).notice == ""


def test_does_without_a_folder_that_cannot_be_written(kept_source, tmp_path):
    (tmp_path / "file").write_text("in the way")
    drawn = kept_source.build(tmp_path / "file", **SMALL)
    assert same(drawn, kept_source.build(tmp_path / "fine", **SMALL))
    assert "could not be kept" in drawn.notice
    assert str(tmp_path / "file") in drawn.notice


def test_a_failed_write_leaves_nothing_behind(kept_source, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept_source.Path, "replace", full)
    assert "No space left on device" in kept_source.build(tmp_path, **SMALL).notice
    assert list(folder(tmp_path, kept_source).iterdir()) == []


def test_two_processes_may_draw_at_once(kept_source, tmp_path):
    code = (
        f"import sys; from pathlib import Path; from {kept_source.__name__} import build;"
        "print(build(Path(sys.argv[1]), train_per_class=5, test_per_class=2).digest)"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE) for _ in range(2)]
    digests = {run.communicate()[0] for run in runs}
    assert [run.returncode for run in runs] == [0, 0]
    assert len(digests) == 1
    again = kept_source.build(tmp_path, train_per_class=5, test_per_class=2)
    assert {again.digest.encode()} == {line.strip() for line in digests}
    assert again.notice == ""
    assert kept(tmp_path, kept_source).is_file()


@pytest.mark.parametrize("wrong", [{"train_per_class": 0}, {"test_per_class": -1}, {"seed": -1}])
def test_refuses_what_cannot_be_drawn(kept_source, tmp_path, wrong):
    with pytest.raises(ValueError, match="at least"):
        kept_source.build(tmp_path, **wrong)


def test_importing_a_source_imports_nothing_that_only_its_use_needs():
    code = (
        "import sys, torch, cilnorm.training.pixels, cilnorm.hookspecs; before = set(sys.modules);"
        "import cilnorm_datasets.numerals, cilnorm_datasets.textures, cilnorm_datasets.cifar100;"
        "print({'PIL', 'rich', 'platformdirs', 'urllib.request', 'tarfile'} & (set(sys.modules) - before))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
