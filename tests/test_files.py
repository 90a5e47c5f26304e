"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from cilnorm.files import write_atomically


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
