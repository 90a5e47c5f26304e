"""``cilnorm prepare``: decodes ahead of the first run, lists and removes."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from cilnorm.cli import app as cli
from cilnorm.data.pixel_cache import entries
from tests.plugins.test_imagefolder import folder


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CILNORM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CILNORM_DATA", raising=False)


def prepare(*arguments: str, status: int = 0) -> Result:
    done = CliRunner().invoke(cli.app, ["prepare", *arguments])
    assert done.exit_code == status, done.output
    return done


def test_a_data_set_is_decoded_listed_and_removed(tmp_path: Path) -> None:
    root = str(folder(tmp_path / "photographs", "train", "val", count=3))
    done = prepare("imagefolder", "--data-root", root, "--set", "size=8")
    assert done.output.splitlines()[-1].startswith("imagefolder: 6 + 6 images of 2 classes, 8 x 8, SHA-256 ")
    [entry] = entries()
    lines = prepare("--list").output.splitlines()
    assert [line.split()[:3] for line in lines if line.split()[:1] == ["imagefolder"]] == [["imagefolder", "8", "12"]]
    assert "removed" in prepare("--remove", "imagefolder").output
    assert not entry.path.exists()
    assert entries() == []


def test_what_can_not_be_prepared_is_told_in_one_line(tmp_path: Path) -> None:
    for arguments, words in (
        ((), "name a data set, or give --list or --remove NAME"),
        (("--remove", "nothing"), "nothing decoded is called 'nothing'"),
        (("imagefolders",), "no dataset called 'imagefolders'; did you mean 'imagefolder'?"),
        (("imagefolder",), "say with --data-root"),
        (("imagefolder", "--set", "sise=8"), "no key called 'sise'"),
        (("imagefolder", "--data-root", str(tmp_path)), "has 0 folders of images"),
    ):
        output = prepare(*arguments, status=2).output
        assert output.startswith("cilnorm: ")
        assert output.count("\n") == 1
        assert words in output


def test_arrays_are_prepared_too(tmp_path: Path) -> None:
    small = ["--set=dataset.train_per_class=2", "--set=dataset.test_per_class=1"]
    done = prepare("numerals", "--data-root", str(tmp_path), *small)
    assert done.output.startswith("numerals: 200 + 100 images of 100 classes, 32 x 32, SHA-256 ")
    assert list((tmp_path / "numerals").iterdir())
