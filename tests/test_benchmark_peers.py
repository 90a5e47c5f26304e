"""What the comparison with PyCIL prints, and that both sides are given the same images."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import frameworks, peers
from cilnorm.images import ImageSet
from cilnorm.registry import Registry, Shelf


@pytest.fixture
def cifar(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """The registry with a CIFAR-100 of 70 training and 30 test images a class, in no order."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for each in (70, 30):
        labels = torch.arange(100).repeat(each)[torch.randperm(100 * each, generator=generator)]
        parts += [torch.randint(256, (100 * each, 3, 32, 32), generator=generator, dtype=torch.uint8), labels]
    names = tuple(map(str, range(100)))
    images = ImageSet(*parts, class_names=names, mean=(0.5,) * 3, std=(0.2,) * 3, digest="drawn")
    record = replace(registry.datasets["cifar100"], build=lambda root: images)
    other = replace(registry, datasets=Shelf("dataset", {"cifar100": record}))
    monkeypatch.setattr(frameworks.registry, "load", lambda: other)
    return other


def test_both_sides_see_the_same_images(cifar: Registry, tmp_path: Path) -> None:
    frameworks.write_few(tmp_path, tmp_path / "theirs", peers.EACH, peers.TESTED)
    ours = peers.few(cifar).datasets["cifar100"].build(tmp_path)
    for part in ("train", "test"):
        theirs = pickle.loads((tmp_path / "theirs" / part).read_bytes())
        images, labels = getattr(ours, f"{part}_images"), getattr(ours, f"{part}_labels")
        assert np.array_equal(theirs["data"], images.flatten(1).numpy())
        assert theirs["fine_labels"] == labels.tolist()
    assert len(ours.train_images) == 100 * peers.EACH


def test_the_table_pairs_the_seeds_that_both_sides_have(tmp_path: Path) -> None:
    lines = []
    for side, lead, seeds in (("ours", 1.0, (0, 2, 4)), ("theirs", 0.0, (0, 2, 7))):
        for seed in seeds:
            accuracies = [40.0 + seed + lead * seed, 20.0 + lead, 10.0]
            lines.append({"side": side, "method": "wa", "seed": seed, "accuracies": accuracies, "step": 2.0 - lead})
    path = tmp_path / "found"
    path.write_text("noise\n" + "\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    titles, *rows = peers.table(path)
    assert titles == ["", "after task 1", "after task 2", "after task 3", "step (s)", "seeds"]
    assert rows == [
        ["wa", "42.00 ± 2.83", "21.00 ± 0.00", "10.00 ± 0.00", "1.000", "0, 2"],
        ["PyCIL wa", "41.00 ± 1.41", "20.00 ± 0.00", "10.00 ± 0.00", "2.000", "0, 2"],
        # Differences of 0 and 2: 1 ± 12.706 standard errors of 1.
        ["ours less theirs", "+1.00 (-11.71 to +13.71)", "+1.00", "+0.00", "ratio 0.50", ""],
    ]
