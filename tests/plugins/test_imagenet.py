"""ImageNet and what is made of it: lists, layouts, and all that can be missing, told in one line."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cilnorm.images import DatasetError, ImageFiles
from cilnorm.training.protocol import class_order
from cilnorm_datasets import imagenet, mini_imagenet, tiny_imagenet

ALL = imagenet.wnids("imagenet")
HUNDREDS = ("imagenet100-1993", "imagenet100-podnet")


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CILNORM_DATA", raising=False)


def fill(folder: Path, classes: Sequence[str], count: int = 1, ending: str = "JPEG", within: str = "") -> None:
    """Files that are named like images; listing them reads none."""
    for name in classes:
        (folder / name / within).mkdir(parents=True)
        for number in range(count):
            (folder / name / within / f"{name}_{number}.{ending}").touch()


def refused(build: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(DatasetError) as caught:
        build(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- lists -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "md5"),
    [
        ("imagenet100-1993", "e28c0845016510886021e9c16fb7bab6"),
        ("imagenet100-podnet", "10beba25a11f5489250da792ff2dd3b1"),
        ("imagenet", "5ef135d00f8768c0f62853cd9dbc563d"),
    ],
)
def test_the_lists_are_those_that_were_checked(name: str, md5: str) -> None:
    path = Path(imagenet.__file__).parent / "lists" / f"{imagenet.LISTS[name]}.txt"
    assert hashlib.md5(path.read_bytes()).hexdigest() == md5


def test_how_the_two_hundreds_come_about() -> None:
    assert list(ALL) == sorted(ALL)
    assert len(set(ALL)) == 1000
    drawn, first = (imagenet.wnids(name) for name in HUNDREDS)
    assert sorted(drawn) == sorted(ALL[at] for at in np.random.RandomState(1993).permutation(1000)[:100])
    assert sorted(first) == list(ALL[:100])
    assert len(set(drawn) & set(first)) == 9


@pytest.mark.parametrize("name", HUNDREDS)
def test_seed_1993_learns_the_sorted_classes_in_the_order_of_the_list(name: str) -> None:
    known = sorted(imagenet.wnids(name))
    assert tuple(known[label] for label in class_order(100, 1993)) == imagenet.wnids(name)


def test_bare_imagenet100_explains_the_two() -> None:
    text = refused(imagenet.ambiguous, None)
    assert text.startswith("imagenet100 is two data sets: imagenet100-1993, ")
    for words in ("imagenet100-podnet", "LUCIR", "DER", "say which"):
        assert words in text


def test_the_shelf_has_them_and_the_bare_name_ends_a_run_in_one_line(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from cilnorm.cli import app as cli
    from cilnorm.registry import load

    assert {"cifar10", "imagefolder", "imagenet", *HUNDREDS, "mini-imagenet", "tiny-imagenet"} <= set(load().datasets)
    done = CliRunner().invoke(cli.app, ["run", "--dataset", "imagenet100", "--out", str(tmp_path / "run")])
    assert done.exit_code == 2
    assert done.output.startswith("cilnorm: imagenet100 is two data sets: ")
    assert not (tmp_path / "run").exists()


# --- ImageNet --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [".", "imagenet", "ILSVRC2012", "ILSVRC/Data/CLS-LOC"])
def test_the_thousand_is_found_in_every_usual_place(tmp_path: Path, place: str) -> None:
    fill(tmp_path / place / "train", ALL, 2)
    fill(tmp_path / place / "val", ALL)
    made = imagenet.build("imagenet", tmp_path)
    assert made.class_names == ALL
    assert made.root == tmp_path / place
    assert made.train[3] == (f"train/{ALL[1]}/{ALL[1]}_1.JPEG", 1)
    assert made.test[-1] == (f"val/{ALL[-1]}/{ALL[-1]}_0.JPEG", 999)
    assert (made.name, made.size) == ("imagenet", 256)
    assert made.notice == "imagenet: 2000 + 1000 images; the official ones are 1281167 + 50000"
    assert imagenet._found("imagenet", tmp_path)


@pytest.mark.parametrize("name", HUNDREDS)
@pytest.mark.parametrize("whole", [False, True])
def test_a_hundred_comes_from_its_own_folder_or_from_the_thousand(tmp_path: Path, name: str, whole: bool) -> None:
    classes = ALL if whole else imagenet.wnids(name)
    fill(tmp_path / "train", classes)
    fill(tmp_path / "val", classes)
    made = imagenet.build(name, tmp_path)
    assert made.class_names == tuple(sorted(imagenet.wnids(name)))
    assert [path.split("/")[1] for path, _ in made.train] == list(made.class_names)
    assert [label for _, label in made.test] == list(range(100))
    assert imagenet._found(name, tmp_path)


def test_official_counts_need_no_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagenet, "TRAIN_IMAGES", {"imagenet100-1993": 200})
    for name, count in (("imagenet100-1993", 2), ("imagenet100-podnet", 3)):
        root = tmp_path / name
        fill(root / "train", imagenet.wnids(name), count)
        fill(root / "val", imagenet.wnids(name), 50)
        assert imagenet.build(name, root).notice == ""


def test_the_other_hundred_is_recognised(tmp_path: Path) -> None:
    fill(tmp_path / "train", imagenet.wnids(HUNDREDS[1]))
    text = refused(imagenet.build, HUNDREDS[0], tmp_path)
    expected = f"{tmp_path}/train has the classes of imagenet100-podnet, of which 9 are in this one"
    assert text == f"imagenet100-1993: {expected}"
    assert not imagenet._found(HUNDREDS[0], tmp_path)


def test_missing_classes_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    fill(tmp_path / "train", ALL[3:])
    text = refused(imagenet.build, "imagenet", tmp_path)
    assert text == f"imagenet: {tmp_path}/train lacks 3 of 1000 classes, {ALL[0]} first"


def test_what_is_not_there_is_told_with_the_layout(tmp_path: Path) -> None:
    assert "no folder of classes in" in refused(imagenet.build, "imagenet", tmp_path)
    name = HUNDREDS[0]
    fill(tmp_path / "train", imagenet.wnids(name))
    assert f"no images in {tmp_path}/val; expected ROOT/train/WNID" in refused(imagenet.build, name, tmp_path)
    fill(tmp_path / "val", imagenet.wnids(name)[1:])
    first = imagenet.wnids(name)[0]
    assert refused(imagenet.build, name, tmp_path) == f"classes differ: only in train/: {first}"
    (tmp_path / "val" / first).mkdir()
    assert f"val/{first} holds no image" in refused(imagenet.build, name, tmp_path)


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """A folder whose validation images lie flat: the class of image n is the n-th from the end."""
    fill(tmp_path / "Data/CLS-LOC/train", ALL)
    (tmp_path / "Data/CLS-LOC/val").mkdir()
    for number in range(1, 1001):
        (tmp_path / f"Data/CLS-LOC/val/ILSVRC2012_val_{number:08d}.JPEG").touch()
    return tmp_path


def check_flat(made: ImageFiles) -> None:
    labels = dict(made.test)
    assert len(labels) == 1000
    assert all(labels[f"val/ILSVRC2012_val_{number:08d}.JPEG"] == 1000 - number for number in range(1, 1001))


def solution(folder: Path) -> Path:
    lines = [f"ILSVRC2012_val_{number:08d},{ALL[-number]} 1 2 3 4 {ALL[0]} 5 6 7 8" for number in range(1, 1001)]
    (folder / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *lines]) + "\n")
    return folder / "LOC_val_solution.csv"


def test_flat_images_with_the_table_of_kaggles_copy(flat: Path) -> None:
    solution(flat)
    check_flat(imagenet.build("imagenet", flat))
    made = imagenet.build(HUNDREDS[1], flat)
    assert sorted(label for _, label in made.test) == list(range(100))


def devkit(folder: Path) -> Path:
    """Numbers of the kit are not the places of sorted ids; ids of inner nodes come after those of classes."""
    from scipy.io import savemat

    place = folder / "ILSVRC2012_devkit_t12/data"
    place.mkdir(parents=True)
    order = np.random.default_rng(0).permutation(1000)
    kinds = [("ILSVRC2012_ID", "i4"), ("WNID", "U9"), ("num_children", "i4")]
    rows = [(number, ALL[at], 0) for number, at in enumerate(order, 1)] + [(1001, "n99999999", 3)]
    savemat(place / "meta.mat", {"synsets": np.array(rows, kinds).reshape(-1, 1)})
    numbers = {ALL[at]: number for number, at in enumerate(order, 1)}
    lines = [str(numbers[ALL[-number]]) for number in range(1, 1001)]
    (place / "ILSVRC2012_validation_ground_truth.txt").write_text("\n".join(lines) + "\n")
    return place


def test_flat_images_with_the_development_kit(flat: Path) -> None:
    devkit(flat / "Data/CLS-LOC")
    check_flat(imagenet.build("imagenet", flat))


def test_flat_images_without_either_or_with_damaged_ones(flat: Path) -> None:
    assert "val is flat, and no LOC_val_solution.csv, nor " in refused(imagenet.build, "imagenet", flat)
    table = solution(flat)
    whole = table.read_text()
    table.write_text(whole.replace("ILSVRC2012_val_00000007,", "ILSVRC2012_val_x,"))
    assert "ILSVRC2012_val_00000007.JPEG is in no list" in refused(imagenet.build, "imagenet", flat)
    for damage in ("a,b\n1,2\n", whole[:100] + "\nx"):
        table.write_text(damage)
        assert f"{table}: not the list of Kaggle's copy" in refused(imagenet.build, "imagenet", flat)
    table.unlink()
    place = devkit(flat)
    (place / "meta.mat").write_bytes(b"no Matlab")
    assert f"{place}: meta.mat or ILSVRC2012_v" in refused(imagenet.build, "imagenet", flat)


# --- Tiny ImageNet ---------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The official layout; notes that give class n the images n and n + 200."""
    folder, classes = tmp_path / "tiny-imagenet-200", sorted(ALL[::5])
    fill(folder / "train", classes, 2, within="images")
    for name in classes:
        (folder / "train" / name / f"{name}_boxes.txt").touch()
    (folder / "val/images").mkdir(parents=True)
    (folder / "test/images").mkdir(parents=True)
    (folder / "test/images/test_0.JPEG").touch()
    names = [(f"val_{number}.JPEG", classes[number % 200]) for number in range(400)]
    for image, _ in names:
        (folder / "val/images" / image).touch()
    notes = "".join(f"{image}\t{name}\t0\t32\t44\t62\n" for image, name in names)
    (folder / "val/val_annotations.txt").write_text(notes)
    (folder / "wnids.txt").write_text("\n".join(reversed(classes)) + "\n")
    return tmp_path


@pytest.mark.parametrize("place", [".", "tiny-imagenet-200"])
def test_tiny_imagenet_in_its_own_layout(tiny: Path, place: str) -> None:
    made = tiny_imagenet.build(tiny / place)
    classes = tuple(sorted(ALL[::5]))
    assert made.class_names == classes
    assert made.train[2] == (f"train/{classes[1]}/images/{classes[1]}_0.JPEG", 1)
    assert len(made.train) == len(made.test) == 400
    assert dict(made.test)["val/images/val_201.JPEG"] == 1
    assert made.size == 64
    assert made.notice.startswith("train and val of ")
    assert tiny_imagenet._found(tiny)


def test_tiny_imagenet_with_validation_images_in_class_folders(tiny: Path) -> None:
    import shutil

    folder = tiny / "tiny-imagenet-200"
    shutil.rmtree(folder / "val/images")
    fill(folder / "val", sorted(ALL[::5]), within="images")
    made = tiny_imagenet.build(tiny)
    assert [label for _, label in made.test] == list(range(200))
    (folder / "val/val_annotations.txt").unlink()
    assert tiny_imagenet.build(tiny).test == made.test


@pytest.mark.parametrize(
    "line", ["val_0.JPEG\tn00000000\t0\t0\n", "val_0.JPEG n01443537 0 0\n", "\n", f"../../x.JPEG\t{ALL[0]}\t0\n"]
)
def test_notes_that_are_damaged_are_named_by_line(tiny: Path, line: str) -> None:
    notes = tiny / "tiny-imagenet-200/val/val_annotations.txt"
    lines = notes.read_text().splitlines(keepends=True)
    notes.write_text("".join([*lines[:6], line, *lines[7:]]))
    assert refused(tiny_imagenet.build, tiny).startswith(f"{notes}, line 7: expected an image's name and a class")


def test_notes_that_leave_a_class_out(tiny: Path) -> None:
    notes = tiny / "tiny-imagenet-200/val/val_annotations.txt"
    notes.write_text("".join(notes.read_text().splitlines(keepends=True)[:150]))
    assert "val/n0" in (text := refused(tiny_imagenet.build, tiny))
    assert "holds no image" in text


def test_what_is_not_tiny_imagenet(tiny: Path) -> None:
    assert "no folder of classes in" in refused(tiny_imagenet.build, tiny / "tiny-imagenet-200/val")
    (tiny / "tiny-imagenet-200/train/extra").mkdir()
    assert "train has 201 classes, not 200; expected ROOT/tiny" in refused(tiny_imagenet.build, tiny)


# --- mini-ImageNet ---------------------------------------------------------------------------------------------------

MINI = sorted(ALL[::10])


@pytest.mark.parametrize("second", ["val", "test"])
def test_mini_imagenet_split_already(tmp_path: Path, second: str) -> None:
    fill(tmp_path / "train", MINI, 5)
    fill(tmp_path / second, MINI, 1)
    made = mini_imagenet.build(tmp_path)
    assert made.class_names == tuple(MINI)
    assert len(made.train) == 500
    assert [path for path, _ in made.test][:1] == [f"{second}/{MINI[0]}/{MINI[0]}_0.JPEG"]
    assert (made.size, made.notice) == (84, f"mini-imagenet in {tmp_path}: not 500 + 100 images of every class")


def test_mini_imagenet_with_official_counts_needs_no_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mini_imagenet, "TRAIN", 5)
    monkeypatch.setattr(mini_imagenet, "TEST", 1)
    fill(tmp_path, MINI, 6)
    made = mini_imagenet.build(tmp_path)
    assert [len(made.train), len(made.test), made.notice] == [500, 100, ""]


def test_mini_imagenet_split_by_class_is_pooled(tmp_path: Path) -> None:
    for split, some in (("train", MINI[:64]), ("val", MINI[64:80]), ("test", MINI[80:])):
        fill(tmp_path / "mini-imagenet" / split, some, 6)
    made = mini_imagenet.build(tmp_path)
    for pairs, count in ((made.train, 5), (made.test, 1)):
        assert np.bincount([label for _, label in pairs]).tolist() == [count] * 100
    assert mini_imagenet.build(tmp_path, split_seed=1).test != made.test
    assert mini_imagenet.build(tmp_path).test == made.test
    assert mini_imagenet._found(tmp_path)


def tables(root: Path) -> Path:
    for split, some in (("train", MINI[:64]), ("val", MINI[64:80]), ("test", MINI[80:])):
        lines = [f"{name}{number:08d}.jpg,{name}" for name in some for number in range(6)]
        (root / f"{split}.csv").write_text("\n".join(["filename,label", *lines]) + "\n")
    return root


def test_mini_imagenet_in_three_tables(tmp_path: Path) -> None:
    made = mini_imagenet.build(tables(tmp_path))
    assert len(made.train) == 500
    assert all(path.startswith(f"images/{MINI[label]}") for path, label in made.train + made.test)


@pytest.mark.parametrize("text", ["filename,label\n../x.jpg,n01\n", "file,class\na,b\n", "filename,label\na\n", "\xff"])
def test_tables_that_are_none(tmp_path: Path, text: str) -> None:
    (tables(tmp_path) / "val.csv").write_text(text, encoding="latin-1")
    assert refused(mini_imagenet.build, tmp_path).startswith(f"{tmp_path}/val.csv: expected lines filename,label")


def test_what_is_not_mini_imagenet(tmp_path: Path) -> None:
    assert "has 0 classes, not 100; expected ROOT/train" in refused(mini_imagenet.build, tmp_path)
    fill(tmp_path / "train", MINI, 2)
    fill(tmp_path / "val", MINI[1:], 2)
    made = mini_imagenet.build(tmp_path)  # a part of the classes may well lie elsewhere: pooled
    assert len(made.train) + len(made.test) == 398
