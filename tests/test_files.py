"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cilnorm import files
from cilnorm.files import in_words, write_atomically


@pytest.mark.parametrize("content", ["naïve\n", b"\x00\xff", ""])
def test_content_is_written_and_replaces_what_was_there(content: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    write_atomically(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert os.listdir(tmp_path) == ["file"]


def test_a_text_that_names_a_path_that_is_no_utf_8(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", os.fsdecode(b"r\xfcn"))
    assert (tmp_path / "file").read_text() == "r\\udcfcn"


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
def test_what_was_there_survives_a_failure(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def fail(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="no"):
        write_atomically(path, "after")
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["file"]


def test_colleagues_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


# Processes

WRITE = """
import os, signal, sys, time
from pathlib import Path
from cilnorm import files
from cilnorm.files import in_words, write_atomically
def instead(handle):
    print("written", flush=True)
    os.kill(os.getpid(), signal.SIGKILL) if sys.argv[2] == "dies" else time.sleep(60)
os.fsync = instead
write_atomically(Path(sys.argv[1]), "half")
"""


def writer(path: Path, end: str) -> subprocess.Popen[bytes]:
    """A process that has written all of ``path`` to its temporary file; then it ``dies``, or ``waits``."""
    process = subprocess.Popen([sys.executable, "-c", WRITE, path, end], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"written\n"
    return process


def test_what_a_killed_writer_left_goes_with_the_next_write_and_nothing_else(tmp_path: Path) -> None:
    others = {".page.html.mine.part", ".page.html.abcdefgh.part.txt", ".other.html.abcdefgh.part"}
    for name in others:
        (tmp_path / name).touch()
    (tmp_path / ".page.html.link_to_.part").symlink_to(tmp_path / ".other.html.abcdefgh.part")
    with writer(tmp_path / "page.html", "dies"):
        pass
    assert len(os.listdir(tmp_path)) == 5
    write_atomically(tmp_path / "page.html", "whole")
    assert set(os.listdir(tmp_path)) == {*others, ".page.html.link_to_.part", "page.html"}


def test_what_another_process_is_writing_stays(tmp_path: Path) -> None:
    with writer(tmp_path / "page.html", "waits") as other:
        write_atomically(tmp_path / "page.html", "whole")
        assert len(os.listdir(tmp_path)) == 2
        other.kill()
    write_atomically(tmp_path / "page.html", "whole")
    assert os.listdir(tmp_path) == ["page.html"]


def test_a_part_that_another_writer_took_for_one_that_was_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It meets the file between its making and its lock, and removes it."""
    lock = files._lock
    removed: list[str] = []

    def late(handle: int) -> bool:
        if not removed:
            [part] = os.listdir(tmp_path)
            removed.append(part)
            os.unlink(tmp_path / part)
        return lock(handle)

    monkeypatch.setattr(files, "_lock", late)
    write_atomically(tmp_path / "file", "whole")
    assert removed
    assert os.listdir(tmp_path) == ["file"]


def test_without_file_locks_nothing_of_others_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "fcntl", None)
    (tmp_path / ".file.abcdefgh.part").touch()
    write_atomically(tmp_path / "file", "whole")
    assert set(os.listdir(tmp_path)) == {".file.abcdefgh.part", "file"}


def test_an_error_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="too large") as caught:
        write_atomically(tmp_path / "last.pt", b"weights")
    assert in_words(caught.value) == f"{tmp_path / 'last.pt'}: File too large"
