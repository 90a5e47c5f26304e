"""Folders of one's own images: every layout, and everything in them that is not as it should be, told in one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from cilnorm.images import DatasetError, ImageFiles
from cilnorm_datasets import imagefolder

pytestmark = pytest.mark.slow


def fill(root: Path, *paths: str) -> Path:
    for number, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 5), (number, 0, 0)).save(root / path)
    return root


def folder(root: Path, *splits: str, classes: tuple[str, ...] = ("cat", "dog"), count: int = 2) -> Path:
    return fill(root, *(f"{s}/{c}/{n}.png" for s in splits for c in classes for n in range(count)))


def message(root: Path | None, **options: object) -> str:
    with pytest.raises(DatasetError) as caught:
        imagefolder.build(root, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CILNORM_DATA", raising=False)


@pytest.mark.parametrize("second", ["test", "val", "valid", "validation"])
def test_two_folders(tmp_path: Path, second: str) -> None:
    made = imagefolder.build(folder(tmp_path, "train", second))
    assert made.train == [
        ("train/cat/0.png", 0),
        ("train/cat/1.png", 0),
        ("train/dog/0.png", 1),
        ("train/dog/1.png", 1),
    ]
    assert made.test == [(path.replace("train", second), label) for path, label in made.train]
    assert (made.name, made.root, made.class_names) == ("imagefolder", tmp_path, ("cat", "dog"))
    assert (made.size, made.damaged, made.notice) == (64, "stop", "")


def test_of_three_folders_test_is_the_test_set_and_the_other_is_named(tmp_path: Path) -> None:
    made = imagefolder.build(folder(tmp_path, "train", "val", "test"))
    assert made.test[0] == ("test/cat/0.png", 0)
    assert made.notice == f"{tmp_path}/test is the test set; left alone: val"


def test_a_test_folder_without_classes_is_none(tmp_path: Path) -> None:
    made = imagefolder.build(fill(folder(tmp_path, "train", "val"), "test/unlabelled.png"))
    assert made.test[0] == ("val/cat/0.png", 0)
    assert made.notice == ""


@pytest.mark.parametrize("within", [".", "train"])
def test_one_folder_is_split_class_by_class(tmp_path: Path, within: str) -> None:
    made = imagefolder.build(folder(tmp_path, within, count=10), test_part=0.3)
    assert sorted(made.train + made.test) == sorted(
        imagefolder.build(tmp_path).train + imagefolder.build(tmp_path).test
    )
    for label in (0, 1):
        assert sum(at == label for _, at in made.train) == 7
        assert sum(at == label for _, at in made.test) == 3
    assert made.train == sorted(made.train)


def drawn(made: ImageFiles) -> set[str]:
    return {path for path, _ in made.test}


def test_the_split_is_drawn_by_seed_and_class_alone(tmp_path: Path) -> None:
    one = folder(tmp_path / "one", ".", count=10)
    more = folder(tmp_path / "more", ".", classes=("ant", "cat", "dog"), count=10)
    first = drawn(imagefolder.build(one))
    assert drawn(imagefolder.build(one)) == first
    assert {path for path in drawn(imagefolder.build(more)) if "ant" not in path} == first
    assert any(drawn(imagefolder.build(one, split_seed=seed)) != first for seed in (1, 2))
    others = [drawn(imagefolder.build(one, split_seed=seed)) for seed in range(9)]
    assert any({path[-5] for path in o if "cat" in path} != {path[-5] for path in o if "dog" in path} for o in others)


def test_a_split_leaves_both_sides_an_image(tmp_path: Path) -> None:
    folder(tmp_path, ".", count=2)
    for part in (0.01, 0.99):
        made = imagefolder.build(tmp_path, test_part=part)
        assert [len(made.train), len(made.test)] == [2, 2]
    for part in (0.0, 1.0, -1.0):
        assert f"must be in (0, 1), not {part}" in message(tmp_path, test_part=part)
    (tmp_path / "cat" / "1.png").unlink()
    assert message(tmp_path) == "cat has 1 images; to be split for training and testing it needs 2"


def test_labels_follow_code_points(tmp_path: Path) -> None:
    names = ("class10", "class2", "Zebra", "äffin", "ant")
    made = imagefolder.build(folder(tmp_path, "train", "val", classes=names))
    assert made.class_names == ("Zebra", "ant", "class10", "class2", "äffin")
    assert [path for path, label in made.train if label == 2] == ["train/class10/0.png", "train/class10/1.png"]


def test_what_is_no_image_is_passed_over(tmp_path: Path) -> None:
    folder(tmp_path, "train", "val")
    before = imagefolder.build(tmp_path)
    strays = (".DS_Store", "Thumbs.db", "notes.txt", ".hidden.png", "._0.png", "names.csv")
    for path in [*(f"train/cat/{name}" for name in strays), "train/read me.txt", "LICENCE"]:
        (tmp_path / path).write_bytes(b"no image")
    for path in ("train/__MACOSX/x.png", "train/.thumbs/x.png", "val/@eaDir/x.png", "train/cat/.cache/x.png"):
        fill(tmp_path, path)
    after = imagefolder.build(tmp_path)
    assert (after.train, after.test, after.class_names) == (before.train, before.test, before.class_names)


def test_every_ending_counts_in_either_case_and_in_folders_within(tmp_path: Path) -> None:
    folder(tmp_path, "train", "val")
    for path in ("a.JPEG", "b.Jpg", "c.webp", "d.heic", "within/e.png", "within/deeper/f.TIFF"):
        (tmp_path / "train/cat" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train/cat" / path).touch()
    listed = [path.removeprefix("train/cat/") for path, label in imagefolder.build(tmp_path).train if not label]
    assert listed == ["0.png", "1.png", "a.JPEG", "b.Jpg", "c.webp", "d.heic", "within/deeper/f.TIFF", "within/e.png"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_class_with_no_image_is_named(tmp_path: Path, split: str) -> None:
    folder(tmp_path, "train", "val")
    for path in (tmp_path / split / "dog").iterdir():
        path.rename(path.with_suffix(".txt"))
    assert message(tmp_path).startswith(f"{tmp_path}/{split}/dog holds no image: ")


def test_classes_that_differ_between_the_folders_are_named(tmp_path: Path) -> None:
    folder(tmp_path, "train", classes=("cat", "dog", "Cow", "emu", "fox"))
    folder(tmp_path, "val", classes=("cat", "cow"))
    text = "classes differ: only in train/: Cow, dog, emu and 1 more; only in val/: cow"
    assert message(tmp_path) == text


LAYOUTS: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing": ((), "has 0 folders of images"),
    "no classes": (("one.png", "two.png"), "has 0 folders of images"),
    "one class": (("train/cat/1.png", "val/cat/1.png"), "train has 1 folders of images"),
    "no train": (("val/cat/1.png", "val/dog/1.png"), "has val/ but no train/"),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_what_is_no_such_layout_is_told_with_the_one_that_was_expected(tmp_path: Path, case: str) -> None:
    paths, words = LAYOUTS[case]
    text = message(fill(tmp_path, *paths))
    assert words in text
    assert text.endswith("or ROOT/CLASS/* alone, two classes or more")


def test_no_folder_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "say with --data-root, or CILNORM_DATA, which folder has it; expected ROOT/train/" in message(None)
    assert f"{tmp_path}/gone is no folder; expected ROOT/train/" in message(tmp_path / "gone")
    monkeypatch.setenv("CILNORM_DATA", str(folder(tmp_path / "there", "train", "val")))
    assert len(imagefolder.build().train) == 4


def test_a_link_that_leaves_the_root_stops_unless_it_is_to_be_followed(tmp_path: Path) -> None:
    root = folder(tmp_path / "root", "train", "val")
    fill(tmp_path / "elsewhere", "secret.png", "class/x.png")
    links = {
        "train/cat/z.png": tmp_path / "elsewhere/secret.png",
        "train/cat/more": tmp_path / "elsewhere/class",
        "train/eel": tmp_path / "elsewhere/class",
    }
    fill(root, "val/eel/0.png")
    for link, target in links.items():
        (root / link).symlink_to(target)
        text = message(root)
        assert text == f"{root}/{link}: a link that leaves {root}, to {target}; if that is meant: --set links=follow"
        (root / link).unlink()
    for link, target in links.items():
        (root / link).symlink_to(target)
    followed = {path for path, _ in imagefolder.build(root, links="follow").train}
    assert {"train/cat/z.png", "train/cat/more/x.png", "train/eel/x.png"} < followed


def test_a_link_within_the_root_is_fine_and_one_in_a_circle_is_not(tmp_path: Path) -> None:
    folder(tmp_path, "train", "val")
    (tmp_path / "train/cat/again.png").symlink_to(tmp_path / "train/cat/0.png")
    assert ("train/cat/again.png", 0) in imagefolder.build(tmp_path).train
    (tmp_path / "train/cat/circle").symlink_to(tmp_path / "train")
    for links in ("stop", "follow"):
        assert message(tmp_path, links=links) == f"{tmp_path}/train/cat/circle: a link to a folder that it is in"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    folder(tmp_path, "train", "val")
    (tmp_path / "train/cat").chmod(0)
    try:
        assert message(tmp_path) == f"{tmp_path}/train/cat: cannot be read (Permission denied)"
    finally:
        (tmp_path / "train/cat").chmod(0o755)


def test_the_doctor_looks_only_where_there_is_a_train_folder(tmp_path: Path) -> None:
    assert not imagefolder._found(None)
    assert not imagefolder._found(folder(tmp_path, "cifar-100-python"))
    assert imagefolder._found(folder(tmp_path, "train"))


def test_a_run_from_photographs_to_accuracies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a stranger would: one command, two tasks, one epoch."""
    from typer.testing import CliRunner

    from cilnorm.cli import app as cli

    monkeypatch.setenv("CILNORM_CACHE", str(tmp_path / "cache"))
    root = folder(tmp_path / "photographs", "train", "val", count=9)
    (root / "train/dog/9.png").write_bytes(b"damaged")
    small = ["--set=size=8", "--set=augmentation.pad=1", "--rows=6:2", "--tasks=2", "--epochs=1", "--memory=4"]
    small += ["--set=first_task=1"]
    arguments = ["run", "--dataset", "imagefolder", "--data-root", str(root), "--out", str(tmp_path / "run"), *small]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 2
    assert "train/dog/9.png (UnidentifiedImageError" in done.output
    done = CliRunner().invoke(cli.app, [*arguments, "--set=damaged=skip"])
    assert done.exit_code == 0, done.output
    assert "1 files that can't be decoded were left out: train/dog/9.png" in (tmp_path / "run/events.jsonl").read_text()
    assert (tmp_path / "run/accuracy.csv").read_text().count("\n") == 3
