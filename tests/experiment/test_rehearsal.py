"""A dry run of many runs: what it says of each, and how often it loads their images."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cilnorm.api import Sweep
from cilnorm.experiment.rehearsal import loading_once
from cilnorm.hookspecs import Dataset
from cilnorm.images import DatasetError, ImageSet
from cilnorm.sweep.grid import Cell
from cilnorm.testing import toys


def test_a_table_loads_each_data_set_once() -> None:
    """One without and one with an option of its own, and one that is not here: five runs each."""
    loaded: Counter[str] = Counter()

    def build(root: Path | None, shade: int = 0, lost: bool = False) -> ImageSet:
        loaded[f"{shade} {lost}"] += 1
        if lost:
            raise DatasetError("no images in nowhere")
        return toys.images(root)

    registry = toys.registry_with("dataset", Dataset("counted", build))
    kinds: list[dict[str, Any]] = [{}, {"dataset.shade": 1}, {"dataset.lost": True}]
    cells = [
        Cell(f"{method} {at}", norm, toys.toy_spec(registry, method=method, norm=norm, dataset="counted", **asked))
        for at, asked in enumerate(kinds)
        for method, norm in (("ft", "bn"), ("ft", "tbbn"), ("ft", "cn*"), ("lucir", "bn"), ("podnet", "gn"))
    ]
    told = Sweep("", "", Path("nowhere"), cells, ()).rehearse(device="cpu", registry=registry)
    assert loaded == {"0 False": 1, "1 False": 1, "0 True": 1}
    assert len(told) == len(cells)
    assert all(refused == ("no images in nowhere" if place[0].endswith("2") else "") for place, refused in told.items())


def test_another_folder_is_another_data_set(tmp_path: Path) -> None:
    folders: list[Path | None] = []

    def build(root: Path | None) -> ImageSet:
        folders.append(root)
        return replace(toys.images(None), digest=f"{len(folders):064x}")

    once = loading_once(toys.registry_with("dataset", Dataset("counted", build))).datasets["counted"].build
    assert once(None) is once(None)
    assert once(tmp_path).digest != once(None).digest
    assert folders == [None, tmp_path]
    with pytest.raises(TypeError):
        once(None, colour=1)
