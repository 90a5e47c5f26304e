"""The norms between batch norm and TBBN are what their names say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import balance
from cilnorm import norm_factory
from cilnorm.batch import Composition
from cilnorm.results.reading import read_result


def test_ghost_statistics_are_those_of_some_rows() -> None:
    ghost, plain, x = balance.Ghost(3), nn.BatchNorm2d(3), torch.randn(64, 3, 4, 4) * 2 + 1
    ghost.compose(Composition(48, 16, 9))
    assert ghost.chosen == (*range(15), *range(48, 53))  # a tenth of the weight on 48 rows: 19.7 equal ones of 64
    out, wanted = ghost(x), plain(x[list(ghost.chosen)])
    torch.testing.assert_close(out[list(ghost.chosen)], wanted, atol=1e-5, rtol=0)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(ghost, name), getattr(plain, name))
    ghost.compose(Composition(64, 0, 0))
    assert torch.equal(ghost(x), plain(x))  # where nothing is past


@pytest.mark.parametrize(("task", "weight"), [(1, 1 / 2), (3, 1 / 8), (9, 1 / 16)])
def test_weighted_has_the_weights_of_the_released_splits(task: int, weight: float) -> None:
    layer, split, x = balance.Weighted(3), norm_factory("tbbn")(3), torch.randn(64, 3, 4, 4) * 2 + 1
    for norm in (layer, split):
        norm.compose(Composition(48, 16, task))
    rows = torch.tensor([weight] * 48 + [1.0] * 16)[:, None, None, None] / (48 * weight + 16)
    mean = (rows * x).sum(0).mean((1, 2))
    var = (rows * (x - mean[:, None, None]).square()).sum(0).mean((1, 2))
    wanted = (x - mean[:, None, None]) * (var[:, None, None] + layer.eps).rsqrt()
    torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=0)
    split(x)
    torch.testing.assert_close(layer.running_mean, split.running_mean)  # the same weights, split or not


@pytest.mark.parametrize("norm", list(balance.NORMS))
def test_they_are_trained_as_any_other(norm: str, tmp_path: Path) -> None:
    few = {"classes": 4, "tasks": 2, "epochs": 1, "size": 8, "dataset.train_per_class": 24, "test_per_class": 2}
    result = balance.run(norm, tmp_path / "run", device="cpu", data_root=tmp_path, memory=16, **few)
    assert result.summary["state"] == "finished"
    assert read_result(result.folder).label == f"ft x {norm}"
