"""The benchmark of streamed images, at toy size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.streaming import measure, plan
from cilnorm.registry import Registry
from cilnorm.spec import Spec
from tests.plugins.test_imagefolder import folder

pytestmark = pytest.mark.slow


def test_every_figure_is_there(
    tiny: Callable[..., Spec], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CILNORM_CACHE", str(tmp_path / "cache"))
    root = folder(tmp_path / "photographs", "train", "val", count=12)
    spec = tiny(dataset="imagefolder", tasks=2, rows=[4, 2], **{"dataset.size": 8})
    found = measure(spec, registry, root, rounds=3, batches=2, count=4)
    assert found["images"] == 48
    assert found["cache, MB"] == 0.0
    assert set(found["step, s"]) == {"device", "stream"}
    assert 0 < found["stream / device"]["low"] <= found["stream / device"]["median"]
    for reading in (found["reading"], found["reading photographs"]):
        assert len(reading) == 4
        assert all(value >= 0 for value in reading.values())
    assert found["decoding, images a second"] > found["decoding photographs, images a second"] > 0
    assert found["plan"]["cache, GB"] == 24.8


def test_the_plan_follows_from_the_rates() -> None:
    reading = {"disk, images a second": 1260.0, "cache, images a second": 12600.0}
    planned = plan({"decoding photographs, images a second": 63.0, "reading photographs": reading})
    assert planned["decoding once, s"] == 2000
    assert (planned["an epoch from the disk, s"], planned["an epoch from the cache, s"]) == (100, 10)
