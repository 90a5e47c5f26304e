"""The benchmark of tellings runs, for a norm that goes by counts and for one that must know labels."""

from __future__ import annotations

import re

import pytest

from benchmarks.telling import main

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("norm", ["tbbn", "cbbn"])
def test_there_is_a_line_a_norm(norm: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--only", norm, "--tellings", "3", "--pairs", "2"])
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(rf"\| {norm} \| \d+\.\d\d \| \d\.\d{{3}} \| \d\.\d{{3}} to \d\.\d{{3}} \|", line)
