"""The benchmarks run; what they measure is for whoever runs them on a quiet machine."""

from __future__ import annotations

import re

import pytest

from benchmarks import methods

pytestmark = pytest.mark.slow


def test_methods(capsys: pytest.CaptureFixture[str]) -> None:
    methods.main(["--only", "ft", "podnet", "afc", "--pairs", "1", "--backbone", "resnet8", "--norm", "tbbn"])
    printed = capsys.readouterr().out
    rows = dict(re.findall(r"^\| (\w+) \| ([\d.]+) \|$", printed, re.MULTILINE))
    assert set(rows) == {"ft", "podnet", "afc"}
    assert all(float(ratio) > 0 for ratio in rows.values())
    assert re.search(r"greedy [\d.]+ s, icarl [\d.]+ s", printed)
