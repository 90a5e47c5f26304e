"""Every script under examples/ runs as it stands there; the plugin in it is tested where it is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.slow
def test_a_table_from_python(tmp_path: Path) -> None:
    script = ROOT / "examples" / "table_from_python.py"
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second, contrast, page = done.stdout.splitlines()[-4:]
    assert first.startswith("ft x bn: A_f of each seed [")
    assert second.startswith("ft x tbbn: A_f of each seed [")
    assert contrast.startswith("the groups differ in norm; ")
    assert page == "small.html"
    assert (tmp_path / "tables" / "small" / "table.tex").is_file()


@pytest.mark.slow
def test_a_replay_loop_of_one_s_own(tmp_path: Path) -> None:
    script = ROOT / "examples" / "replay_loop.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) < 80
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [[float(value) for value in line.split()] for line in done.stdout.splitlines()]
    assert [len(line) for line in lines] == [1, 2, 3]
    assert lines[2][2] > 25  # of the last task, among 15 classes; chance is 7


def test_every_script_has_a_test() -> None:
    tested = Path(__file__).read_text(encoding="utf-8")
    assert [script.name for script in SCRIPTS if script.name not in tested] == []
