"""What the README promises is run as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import pages

pytestmark = pytest.mark.slow

CHANCE = 100 / 20  # of the example's classes
README = Path(__file__).resolve().parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    return [block.text for block in pages.blocks(README, language)]


def write_plugin(folder: Path) -> None:
    """The README's plugin as pip would install it: the module and its entry point."""
    code = next(block for block in blocks("python") if "hookimpl" in block)
    toml = next(block for block in blocks("toml") if "entry-points.cilnorm" in block)
    (folder / "halves.py").write_text(code)
    metadata = folder / "halves-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: halves\nVersion: 0.1\n")
    entry = re.search(r"\[project\.entry-points\.cilnorm\]\n(.*)", toml)
    assert entry
    (metadata / "entry_points.txt").write_text("[cilnorm]\n" + entry[1].replace('"', "") + "\n")


def test_the_norm_in_one_file_is_listed_and_runs(tmp_path: Path) -> None:
    write_plugin(tmp_path)
    start = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from cilnorm.cli.app import main; main()"

    def cilnorm(command: str) -> str:
        call = [sys.executable, "-c", start, *command.split()]
        done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "halves 0.1" in cilnorm("list")
    printed = cilnorm("run --norm halves --tasks 2 --epochs 1 --set classes=4 --memory 16")
    assert "halves" in printed
    assert "A_f" in printed


def test_the_norm_in_one_file_weighs_both_kinds_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cilnorm import registry
    from cilnorm.batch import Composition, set_composition

    write_plugin(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    layer = registry.load().norms["halves"].build(3)
    set_composition(layer, Composition(6, 2, 1))
    x = torch.randn(8, 3, 4, 4)
    repeated = torch.cat([x[:6], x[6:], x[6:], x[6:]])
    torch.testing.assert_close(layer(x)[:6], torch.nn.BatchNorm2d(3)(repeated)[:6])


def test_the_python_example_runs(tmp_path: Path) -> None:
    example = next(block for block in blocks("python") if "cilnorm.run" in block)
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *shown, final, paper = done.stdout.splitlines()
    assert [line.split(":")[0] for line in shown if line.startswith("task ")][-2:] == ["task  1", "task  2"]
    assert 2 * CHANCE < float(final.split()[0]) <= 100
    assert paper == "https://arxiv.org/abs/2201.12559"
    assert (next((tmp_path / "runs").iterdir()) / "accuracy.csv").is_file()
