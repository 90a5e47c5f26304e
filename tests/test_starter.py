"""What ``cilnorm new`` makes installs, passes its own tests, is listed and runs, with nothing changed."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cilnorm.cli import app as cli
from cilnorm.registry import load
from cilnorm.starter import KINDS, make_package
from cilnorm.values import SpecError

pytestmark = pytest.mark.slow


def installed(package: Path, site: Path) -> None:
    """The package as pip installs it: its module, and the metadata with the entry points."""
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    for source in package.glob("cilnorm_*"):
        (site / source.name).symlink_to(source)
    metadata = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = (f"{name} = {module}" for name, module in project["entry-points"]["cilnorm"].items())
    (metadata / "entry_points.txt").write_text("[cilnorm]\n" + "\n".join(lines) + "\n")


def called(site: Path, *command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], env=environment, cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_package_is_whole_at_once(kind: str, tmp_path: Path) -> None:
    package, site = make_package(kind, "my-own", tmp_path, load()), tmp_path / "site"
    site.mkdir()
    installed(package, site)
    listed = called(site, "-m", "cilnorm", "list", "--strict", cwd=tmp_path)
    assert any(line.split()[:1] == ["my-own"] and "cilnorm-my-own 0.1.0" in line for line in listed.stdout.splitlines())
    tested = called(site, "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=package)
    assert tested.returncode == 0, tested.stdout[-3000:]
    assert " passed" in tested.stdout
    module = package / "cilnorm_my_own" / "my_own.py"
    assert len(module.read_text().splitlines()) <= 60
    assert "api_version = 1" in module.read_text()
    if kind == "logger":  # the command runs the very checks that the package's tests run
        checked = called(site, "-m", "cilnorm", "check", "cilnorm-my-own", cwd=tmp_path)
        assert checked.returncode == 0, checked.stdout
        assert "0 BROKEN" in checked.stdout


def test_the_command_says_what_comes_next(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["new", "norm", "halved", "--out", str(tmp_path)])
    assert result.exit_code == 0
    assert (tmp_path / "cilnorm-halved" / "cilnorm_halved" / "halved.py").is_file()
    assert "cilnorm check cilnorm-halved" in result.output
    again = CliRunner().invoke(cli.app, ["new", "norm", "halved", "--out", str(tmp_path)])
    assert again.exit_code == 2
    assert "is there already; give --out another place" in again.output


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("optimiser", "mine", "there is no plugin of the kind 'optimiser'"),
        ("norm", "tbbn", "the norm 'tbbn' is already there, from cilnorm"),
        ("norm", "Mine", "is no name for a norm"),
        ("norm", "../mine", "is no name for a norm"),
        ("norm", "9lives", "is no name for a norm"),
    ],
)
def test_what_can_not_be_made_is_refused(kind: str, name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=said):
        make_package(kind, name, tmp_path, load())
    assert not list(tmp_path.iterdir())


def test_the_example_of_a_norm_keeps_the_contrast_between_places(tmp_path: Path) -> None:
    """One that scales each place by itself takes it away; ``quick`` then learns its first task as if by chance."""
    package = make_package("norm", "plain", tmp_path, load())
    layer = runpy.run_path(str(package / "cilnorm_plain" / "plain.py"))["PlainNorm2d"](8)
    x = torch.ones(2, 8, 6, 6)
    x[:, :, 2:4] = 3.0
    y = layer(x)
    assert y[:, :, 2:4].mean() - y[:, :, :2].mean() > 1
