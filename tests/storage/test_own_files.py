"""What a run owns in its folder, and that nothing else is touched: overwriting, links, pipes, reading."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cilnorm.cli import app as cli
from cilnorm.experiment import runner
from cilnorm.experiment.runner import resume, run
from cilnorm.files import open_plain, read_plain, write_atomically
from cilnorm.registry import Registry
from cilnorm.results.export import export
from cilnorm.spec import Settings, Spec, SpecError, resolve, to_yaml
from cilnorm.storage.checkpoint import CheckpointError
from cilnorm.storage.figures import draw_figures
from cilnorm.storage.lock import lock_folder
from cilnorm.storage.own_files import survey
from cilnorm.storage.run_folder import LOCK, FolderError, RunFolder
from tests.conftest import TINY
from tests.experiment.test_runner import CPU, bits

pytestmark = pytest.mark.slow

Tiny = Callable[..., Spec]
OWN = ("spec.yaml", "lock", "events.jsonl", "checkpoints/last.pt", "figures/matrix.png", "probes/bn-bias.svg",
       "trials/lr 0.1/summary.json")  # fmt: skip
OTHERS = (
    "thesis.tex",
    "src/",
    "checkpoints/mine.pt",
    "figures/for paper.png",
    "trials/notes",
    ".hidden",
    "trials/a/src/",
)


@pytest.fixture(scope="module")
def whole(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one task, figures included, to be copied."""
    spec = resolve("tiny", registry, Settings({"tiny": TINY}, {}), tasks=2, epochs=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "draw_figures", draw_figures)
        return run(spec, tmp_path_factory.mktemp("whole") / "run", registry=registry, **CPU).folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def tree(folder: Path) -> dict[str, str]:
    """What lies in a folder, with contents and modes."""
    found = {}
    for path in sorted(folder.rglob("*")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path.relative_to(folder))] = f"{path.lstat().st_mode:o} {path.lstat().st_mtime_ns} {digest}"
    return found


def put(folder: Path, name: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (path / "inside").mkdir(parents=True) if name.endswith("/") else path.write_text("years of work")


# Overwriting


def test_own_names_parts_and_others_are_told_apart(tmp_path: Path) -> None:
    for name in (*OWN, *OTHERS, ".spec.yaml.a8_.part", "figures/.accuracy.png.x.part", ".thesis.tex.x.part", "log.csv"):
        put(tmp_path, name)
    os.symlink(tmp_path / "thesis.tex", tmp_path / "summary.json")
    (tmp_path / "accuracy.csv").mkdir()
    found = survey(tmp_path, ["log.csv"])
    assert set(found.own) == {*OWN, "log.csv"}
    assert set(found.parts) == {".spec.yaml.a8_.part", "figures/.accuracy.png.x.part"}
    assert set(found.others) == {*OTHERS, ".thesis.tex.x.part", "summary.json", "accuracy.csv/"}


@pytest.mark.parametrize("other", OTHERS)
def test_overwrite_removes_nothing_of_others_and_is_not_advised(
    other: str, tiny: Tiny, registry: Registry, tmp_path: Path
) -> None:
    (tmp_path / "spec.yaml").write_text(to_yaml(tiny()))
    put(tmp_path, other)
    before = tree(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(FolderError) as caught:
            run(tiny(), tmp_path, registry=registry, overwrite=overwrite, **CPU)
        assert f"holds other files, which stay as they are: {other};" in str(caught.value)
        assert "--overwrite" not in str(caught.value)
    with pytest.raises(FolderError, match="a run of another spec; give another --out"):
        run(tiny(seed=1), tmp_path, registry=registry, go_on=True, **CPU)
    assert tree(tmp_path) == before


def test_overwrite_replaces_all_that_a_run_and_its_loggers_wrote(
    tiny: Tiny, registry: Registry, tmp_path: Path
) -> None:
    names = ["log.csv", "tensorboard/events.out.tfevents.1.host.2.0", *OWN, "figures/.matrix.png.abc.part"]
    for name in names:
        put(tmp_path, name)
    RunFolder.create(tmp_path, tiny(), overwrite=True, also=registry.logger_files)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {"spec.yaml", "lock", "checkpoints", "figures"}


def test_a_run_and_its_probe_leave_own_names_alone(figures: None, folder: Path, registry: Registry) -> None:
    from cilnorm.experiment.loggers import Loggers
    from cilnorm.results.probe import bn_bias

    with Loggers(["csv", "tensorboard"], registry) as logging:
        resume(folder, registry=registry, watch=[logging], **CPU)
    bn_bias(folder, epochs=0, device="cpu", registry=registry)
    found = survey(folder, registry.logger_files)
    assert found.others == ()
    assert {"figures/matrix.pdf", "probes/bn-bias.pdf"} <= set(found.own)


def test_figures_make_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        draw_figures(tmp_path / "gone" / "figures", [[1.0]], "title")
    assert not (tmp_path / "gone").exists()


def test_many_names_take_a_line(tiny: Tiny, tmp_path: Path) -> None:
    for number in range(30):
        put(tmp_path, f"notes {number:02d}")
    with pytest.raises(FolderError, match=r"notes 00, .*, notes 05 and 24 more; give --out a new folder"):
        RunFolder.check(tmp_path)


def test_going_on_leaves_temporary_files_of_others(folder: Path, registry: Registry) -> None:
    for name in (".thesis.tex.abc.part", "src/.summary.json.abc.part", ".summary.json.abc.part"):
        put(folder, name)
    resume(folder, registry=registry, **CPU)
    assert (folder / ".thesis.tex.abc.part").exists()
    assert (folder / "src" / ".summary.json.abc.part").exists()
    assert not (folder / ".summary.json.abc.part").exists()


# Links, pipes, devices


def make(kind: str, path: Path, target: Path) -> None:
    if kind == "link":
        os.symlink(target, path)
    elif kind == "dangling":
        os.symlink(target.with_name("nowhere"), path)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "zero":
        os.symlink("/dev/zero", path)
    else:
        path.mkdir()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "zero", "folder"])
@pytest.mark.parametrize(
    "name", ["lock", "spec.yaml", "events.jsonl", "confusion.csv", "environment.json", "checkpoints/last.pt"]
)
def test_a_run_opens_plain_files_alone(kind: str, name: str, folder: Path, registry: Registry, tmp_path: Path) -> None:
    target = tmp_path / "outside"
    target.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b'{"pid": 1}')
    content = target.read_bytes()
    (folder / name).unlink(missing_ok=True)
    make(kind, folder / name, target)
    if name == "checkpoints/last.pt":  # the one before it is read
        resume(folder, registry=registry, **CPU)
        assert os.path.lexists(folder / "checkpoints" / "damaged.pt")
    else:
        with pytest.raises((FolderError, SpecError), match=rf"{name}\b") as caught:
            resume(folder, registry=registry, **CPU)
        assert "\n" not in str(caught.value)
    assert target.read_bytes() == content
    assert sorted(os.listdir(tmp_path)) == ["outside", "run"]


@pytest.mark.parametrize("name", ["checkpoints", "figures"])
def test_folders_that_are_links(
    figures: None, name: str, folder: Path, tiny: Tiny, registry: Registry, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    (folder / name).rename(outside)
    os.symlink(outside, folder / name)
    before = tree(outside)
    with pytest.raises((FolderError, CheckpointError), match="it is a symbolic link"):
        resume(folder, registry=registry, **CPU)
    with pytest.raises(FolderError, match=f"holds other files, which stay as they are: {name};"):
        run(tiny(), folder, registry=registry, overwrite=True, **CPU)
    assert tree(outside) == before


@pytest.mark.parametrize("file", ["summary.json", "accuracy.csv", "figures/matrix.png", "log.csv"])
def test_what_is_written_anew_takes_a_links_place(
    figures: None, file: str, folder: Path, registry: Registry, tmp_path: Path
) -> None:
    target = tmp_path / "outside"
    target.write_text("untouched")
    (folder / file).unlink(missing_ok=True)
    os.symlink(target, folder / file)
    if file == "log.csv":
        from cilnorm_loggers.csv_file import CsvLogger

        with pytest.raises(OSError, match="it is a symbolic link"):
            CsvLogger(folder)({"event": "accuracy", "task": 1, "accuracy": [1.0], "seconds": 1.0})
    else:
        resume(folder, registry=registry, **CPU)
        assert not (folder / file).is_symlink()
    assert target.read_text() == "untouched"


def test_a_socket_and_a_link_met_on_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
        with pytest.raises(OSError, match="it is a socket"):
            read_plain(Path("socket"))
    Path("file").write_text("x")
    os.symlink("file", "link")
    monkeypatch.setattr(os, "lstat", os.stat)  # it became a link between the look and the opening
    with pytest.raises(OSError, match="symbolic links"):
        open_plain(Path("link"))


def test_hard_links_are_parted_before_they_are_written(folder: Path, registry: Registry, tmp_path: Path) -> None:
    """A lock that has another name, and a copy made of hard links."""
    (tmp_path / "outside").write_text("untouched")
    os.link(tmp_path / "outside", folder / LOCK)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, copy_function=os.link)
    before = tree(copy)
    resume(folder, registry=registry, **CPU)
    assert tree(copy) == before
    assert (tmp_path / "outside").read_text() == "untouched"


def test_two_paths_to_one_folder(folder: Path, tmp_path: Path) -> None:
    os.symlink(folder, tmp_path / "alias")
    with lock_folder(folder), pytest.raises(FolderError, match="is at work there"), lock_folder(tmp_path / "alias"):
        pass


def test_a_lock_whose_number_belongs_to_another_process_by_now(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(json.dumps({"pid": os.getppid(), "host": socket.gethostname()}))
    with lock_folder(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


# Reading


def commands(folder: Path, place: Path) -> list[list[str]]:
    run, out = str(folder), str(place)
    return [
        ["export", run, "--out", f"{out}/export"],
        ["report", run, "--out", f"{out}/report.html", "--figures", f"{out}/figures"],
        ["compare", run, run],
        ["probe", "bn-bias", run, "--epochs", "0", "--device", "cpu", "--out", f"{out}/probe"],
    ]


@pytest.mark.parametrize("state", ["sound", "damaged"])
def test_reading_changes_nothing(
    state: str, folder: Path, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cilnorm.registry.load", lambda **_: registry)
    if state == "damaged":
        last = folder / "checkpoints" / "last.pt"
        last.write_bytes(last.read_bytes()[:-1])
    (tmp_path / "out").mkdir()
    for path in (folder, folder / "checkpoints", folder / "figures"):
        path.chmod(0o555)
    before = tree(folder)
    for command in commands(folder, tmp_path / "out"):
        done = CliRunner().invoke(cli.app, command)
        assert tree(folder) == before, command
        if state == "damaged" and command[0] != "report":
            assert done.exit_code == 2, done.output
            assert f"{folder}/checkpoints/last.pt" in done.stderr
            assert len(done.stderr.splitlines()) == 1
        else:
            assert done.exit_code == 0, done.output
    for path in (folder, folder / "checkpoints", folder / "figures"):
        path.chmod(0o755)


def test_a_run_killed_between_two_renames_is_exported(folder: Path, registry: Registry, tmp_path: Path) -> None:
    os.replace(folder / "checkpoints" / "last.pt", folder / "checkpoints" / "previous.pt")
    before = tree(folder)
    export(folder, tmp_path / "out", registry)
    assert tree(folder) == before


@pytest.mark.parametrize("name", ["model.safetensors", "card.json"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 20, b"[" * 100_000, b"\x02\0\0\0\0\0\0\0{}"])
def test_an_export_replaces_an_export_alone(
    name: str, content: bytes, folder: Path, registry: Registry, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export(folder, out, registry)
    export(folder, out, registry)
    (out / name).write_bytes(content)
    before = tree(out)
    with pytest.raises(FolderError, match=rf"{name} is no export of a run, and stays as it is"):
        export(folder, out, registry)
    assert tree(out) == before
    with pytest.raises(FolderError, match="is the folder of a run, which stays as it is"):
        export(folder, folder, registry)


# What a resumed run adds to


DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "a count cut off": ("confusion.csv", lambda raw: raw[: raw.rindex(b",")], "has 1 counts of task 2 after task 2"),
    "a row cut off": ("confusion.csv", lambda raw: raw[: raw[:-1].rindex(b"\n")], "rows after task 2 are missing"),
    "no number": ("confusion.csv", lambda raw: raw.replace(b"\n1,1,", b"\n1,x,"), "line 2 is no row of counts"),
    "zeros": ("confusion.csv", lambda raw: b"\0" * len(raw), "can't be read"),
    "empty": ("confusion.csv", lambda raw: b"", "line 1 is no header"),
    "bytes": ("confusion.csv", lambda raw: b"\xff" + raw, "can't decode"),
    "a line of the log": ("events.jsonl", lambda raw: b"garbage\n" + raw, "line 1 is no event"),
    "a log of zeros": ("events.jsonl", lambda raw: b"\0" * 100 + raw[100:], "line 1 is no event"),
    "an environment cut off": ("environment.json", lambda raw: raw[:-9], "can't be read"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_will_be_added_to_is_checked_first(case: str, folder: Path, registry: Registry) -> None:
    name, damage, reason = DAMAGE[case]
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    before = tree(folder)
    with pytest.raises(FolderError) as caught:
        resume(folder, registry=registry, **CPU)
    assert str(caught.value).startswith(f"{folder / name}: can't be read: ")
    assert reason in str(caught.value)
    assert "; put a sound copy back, or move it away and go on without " in str(caught.value)
    assert tree(folder) == before
    (folder / name).unlink()
    resume(folder, registry=registry, **CPU)


def test_a_damaged_matrix_is_written_anew(folder: Path, whole: Path, registry: Registry) -> None:
    (folder / "accuracy.csv").write_bytes(b"\0" * 20)
    resume(folder, registry=registry, **CPU)
    assert bits(folder) == bits(whole)


def test_counts_that_were_moved_away_keep_their_tasks(tmp_path: Path) -> None:
    from cilnorm.storage.accuracy_files import read_confusion

    folder = RunFolder(tmp_path)
    folder.write_confusion([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    assert read_confusion(tmp_path) == [[], [], [[1, 2, 3], [4, 5, 6], [7, 8, 9]]]
    folder.write_confusion([[1] * 4] * 4)
    assert read_confusion(tmp_path)[2:] == [[[1, 2, 3], [4, 5, 6], [7, 8, 9]], [[1] * 4] * 4]


def test_another_environment_is_told_and_both_are_kept(
    folder: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = json.loads((folder / "environment.json").read_text())
    resume(folder, registry=registry, **CPU)
    assert json.loads((folder / "environment.json").read_text()) == first
    described = runner.RunFolder.write_environment.__globals__["describe"]

    def elsewhere(*arguments: Any) -> dict[str, Any]:
        now = described(*arguments)
        return {**now, "threads": 64, "packages": {**now["packages"], "torch": "9.9"}}

    monkeypatch.setattr("cilnorm.storage.run_folder.describe", elsewhere)
    heard: list[dict[str, Any]] = []
    resume(folder, registry=registry, watch=[heard.append], **CPU)
    [text] = [event["text"] for event in heard if event["event"] == "warning"]
    assert f"packages.torch 9.9, was {first['packages']['torch']}; threads 64, was {first['threads']}" in text
    found = json.loads((folder / "environment.json").read_text())
    [later] = found.pop("later")
    assert found == first
    assert (later["threads"], later["packages"]["torch"]) == (64, "9.9")
    heard.clear()
    resume(folder, registry=registry, watch=[heard.append], **CPU)
    assert not [event for event in heard if event["event"] == "warning"]
    monkeypatch.undo()
    resume(folder, registry=registry, **CPU)
    assert len(json.loads((folder / "environment.json").read_text())["later"]) == 2


# Places that are none


@pytest.mark.parametrize(
    ("make_it", "says"),
    [
        (lambda path: None, "holds no run: there is no such folder"),
        (lambda path: path.write_text("x"), "holds no run: it is a file, not the folder of one"),
        (lambda path: path.mkdir(), "holds no run: it is empty"),
        (lambda path: put(path, "notes"), "holds no run: there is no spec.yaml"),
        (lambda path: put(path, "cells/ft-bn-s0/spec.yaml"), "holds no run itself, but 1 inside: "),
    ],
)
def test_no_run(make_it: Callable[[Path], None], says: str, registry: Registry, tmp_path: Path) -> None:
    place = tmp_path / "place"
    make_it(place)
    before = tree(tmp_path)
    with pytest.raises(FolderError) as caught:
        resume(place, registry=registry, **CPU)
    assert str(caught.value).startswith(f"{place} {says}")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("what", ["moved", "removed", "replaced"])
@pytest.mark.parametrize("when", ["epoch", "accuracy"])
def test_a_folder_that_goes_while_it_runs(what: str, when: str, tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    place = tmp_path / "run"

    def go(event: dict[str, Any]) -> None:
        if event["event"] == when and not (tmp_path / "gone").exists():
            shutil.rmtree(place) if what == "removed" else place.rename(tmp_path / "gone")
            if what == "replaced":
                for name in ("checkpoints", "figures"):
                    (place / name).mkdir(parents=True)
                (place / LOCK).write_text("of another")

    with pytest.raises(runner.RunStopped) as caught:
        run(tiny(), place, registry=registry, watch=[go], **CPU)
    assert f"{place} was moved or removed while the run was at work; nothing more is written" in str(caught.value)
    left = sorted(path.name for path in place.rglob("*"))
    assert left == (["checkpoints", "figures", "lock"] if what == "replaced" else [])


def test_a_clock_that_goes_back(folder: Path, whole: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 0.0)
    resume(folder, registry=registry, **CPU)
    assert bits(folder) == bits(whole)


def test_messages_name_the_file_and_not_its_temporary_name(tmp_path: Path) -> None:
    from cilnorm.files import in_words

    with pytest.raises(OSError) as caught:
        write_atomically(tmp_path / "none" / "summary.json", "")
    assert in_words(caught.value) == f"{tmp_path}/none/summary.json: No such file or directory"
