"""The layer against its equation, and its way in: in the registry, in the list, in a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cilnorm_example.rms import RMSNorm2d

from cilnorm import registry
from cilnorm.api import plan_table


def cilnorm(*arguments: str) -> str:
    """What the command prints."""
    command = [sys.executable, "-c", "from cilnorm.cli.app import main; main()", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_it_is_the_equation() -> None:
    layer = RMSNorm2d(3, eps=0.1, dtype=torch.float64)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    expected = torch.empty_like(x)
    for n in range(2):
        for h in range(4):
            for w in range(5):
                size = (sum(x[n, c, h, w] ** 2 for c in range(3)) / 3 + 0.1) ** 0.5
                for c in range(3):
                    expected[n, c, h, w] = layer.weight[c] * x[n, c, h, w] / size + layer.bias[c]
    torch.testing.assert_close(layer(x), expected.detach())


@pytest.mark.parametrize("affine", [True, False])
def test_training_is_evaluation_and_no_row_depends_on_another(affine: bool) -> None:
    layer, x = RMSNorm2d(4, affine=affine), torch.randn(6, 4, 3, 3)
    y = layer(x)
    assert torch.equal(layer.eval()(x), y)
    torch.testing.assert_close(layer(x[2:3]), y[2:3])
    assert bool(list(layer.parameters())) is affine


def test_gradients_are_those_of_finite_differences() -> None:
    layer = RMSNorm2d(3, dtype=torch.float64)
    assert torch.autograd.gradcheck(layer, torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True))


def test_it_stands_on_the_shelf_under_its_distribution() -> None:
    norms = registry.load(strict=True).norms
    assert norms["rms"].build is RMSNorm2d
    assert norms.sources["rms"] == "cilnorm-example 0.1.0"


def test_it_is_listed() -> None:
    lines = [line for line in cilnorm("list").splitlines() if line.split()[:1] == ["rms"]]
    assert len(lines) == 2  # the norm, and the grid
    assert all("cilnorm-example 0.1.0" in line for line in lines)
    [line] = [line for line in cilnorm("plugins").splitlines() if "example.rms" in line]
    assert line.split()[-1] == "ok"


def test_its_grid_can_be_filled(tmp_path: Path) -> None:
    cells = plan_table("rms", out=tmp_path, registry=registry.load(strict=True)).cells
    assert {cell.norm for cell in cells} == {"bn", "ln2d", "gn", "rms"}


def test_it_can_be_trained_with(tmp_path: Path) -> None:
    short = ["--tasks", "1", "--epochs", "1", "--set", "classes=10", "--set", "dataset.train_per_class=10"]
    printed = cilnorm("run", "--norm", "rms", *short, "--backbone", "resnet8", "--out", str(tmp_path / "run"))
    assert "ft x rms x resnet8 x textures" in printed
    assert (tmp_path / "run" / "accuracy.csv").exists()
