"""Runs whose images are read while they train: the same bits, bounded memory, and no thread left by what stops them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.chaos import results
from cilnorm.experiment import assembly
from cilnorm.experiment.precise import precise
from cilnorm.experiment.runner import RunStopped, resume, run
from cilnorm.registry import Registry
from cilnorm.results import probe
from cilnorm.spec import Spec, SpecError
from cilnorm.storage.interruptions import Interrupted
from cilnorm.training.streamed_images import StreamedImages
from tests.conftest import ROOT
from tests.experiment.test_going_on import killed_at
from tests.experiment.test_runner import CPU, Event, events

pytestmark = pytest.mark.slow

Tiny = Callable[..., Spec]
RELEASED = {"protocol": "released", "classifier": "nme"}  # held-out images, their loss, class means
AS_WE_READ = {"statistics.precise": "class-balanced", "crop_size": 6, "crop": "resized"}


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "save", lambda *_: None)


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("cilnorm-images")]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six classes of 24 + 20 files of noise around a colour of each class."""
    root, random = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for number in range(6):
        colour = random.integers(60, 196, 3)
        for split, count in (("train", 24), ("test", 20)):
            (root / split / str(number)).mkdir(parents=True)
            for at in range(count):
                pixels = (colour + random.integers(-60, 61, (8, 8, 3))).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / str(number) / f"{at}.png")
    return root


@pytest.fixture
def filed(photographs: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a spec on the files."""
    monkeypatch.setenv("CILNORM_CACHE", str(tmp_path / "cache"))

    def go(call: Callable[..., Any], what: Any, *rest: Any, **named: Any) -> Any:
        return call(what, *rest, data_root=photographs, **CPU, **named)

    return go


@pytest.fixture
def streamed(tiny: Tiny) -> Tiny:
    return lambda **asked: tiny(**{"dataset": "imagefolder", "residence": "stream", "dataset.size": 8, **asked})


@pytest.mark.parametrize(
    ("method", "norm", "options"),
    [
        ("two-phases", "tbbn", AS_WE_READ),
        ("lucir", "bn", RELEASED),
        ("afc", "bn", {"epochs": 1}),
        ("ft", "bn", {"batches": "shuffled"}),  # a shorter last batch
    ],
)
def test_a_streamed_run_gives_the_bits_of_one_with_its_images_at_hand(
    method: str, norm: str, options: Any, streamed: Tiny, filed: Any, registry: Registry, tmp_path: Path
) -> None:
    """Stopped within an epoch and gone on with, once as it was, once the other way; then probed."""
    stream, device = (streamed(method=method, norm=norm, residence=where, **options) for where in ("stream", "device"))
    assert stream.key == device.key == streamed(method=method, norm=norm, residence="auto", **options).key
    filed(run, device, tmp_path / "whole", registry=registry)
    for spec, folder in ((stream, tmp_path / "run"), (device, tmp_path / "turned")):
        with pytest.raises(RunStopped, match="Kill"):
            filed(run, spec, folder, registry=registry, watch=[killed_at(11)], checkpoint_every=1e-9)
        assert not readers()
        if spec is device:
            text = (folder / "spec.yaml").read_text()
            (folder / "spec.yaml").write_text(text.replace("residence: device", "residence: stream"))
        filed(resume, folder, registry=registry)
        assert not readers()
        assert results(folder) == results(tmp_path / "whole")
    measured, retuned = (
        [filed(measure, tmp_path / name, registry=registry, out=tmp_path / "probes") for name in ("run", "whole")]
        for measure in (precise, probe.bn_bias)
    )
    assert measured[0] == measured[1]
    assert (retuned[0].accuracy, retuned[0].layers) == (retuned[1].accuracy, retuned[1].layers)
    assert not readers()


def test_images_that_lie_in_memory_are_streamed_too(tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    for where in ("device", "stream"):
        run(tiny(method="two-phases", residence=where), tmp_path / where, registry=registry, **CPU)
    assert results(tmp_path / "stream") == results(tmp_path / "device")


def test_what_is_streamed_is_decided_by_the_memory_that_is_free(
    tiny: Tiny, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training and test images together."""
    taken = (24 + 20) * 6 * 3 * 8 * 8
    for free, residence, expected in (
        (2 * taken, "auto", False),
        (2 * taken - 1, "auto", True),
        (1, "device", False),
        (1 << 40, "stream", True),
    ):
        monkeypatch.setattr("cilnorm.training.streamed_images.free_memory", lambda device, free=free: free)
        parts = assembly.assemble(tiny(residence=residence), registry, torch.device("cpu"))
        assert (parts.train.streamed, parts.test.streamed) == (expected, expected)
    with pytest.raises(SpecError, match="residence: 'disk' is none of auto, device, stream"):
        tiny(residence="disk")


def cut_short(cache: Path, images: int) -> None:
    [raw] = cache.rglob("pixels.raw")
    raw.chmod(0o644)
    os.truncate(raw, images * 3 * 8 * 8)


@pytest.mark.parametrize(("left", "epochs"), [(0, 2), (24 * 6 + 10, 4)])
def test_a_file_that_can_not_be_read_any_more_stops_the_run_in_one_line(
    left: int, epochs: int, streamed: Tiny, filed: Any, registry: Registry, tmp_path: Path
) -> None:
    """While it trains the second task, and when all its epochs are done and it is tested; what was done is kept."""

    def watch(event: Event) -> None:
        if event["event"] == "task" and event["task"] == 2:
            cut_short(tmp_path / "cache", left)

    message = r"^task 2, epoch 1: .*pixels\.raw: ends within image \d+; what was done is in [^\n]*$"
    with pytest.raises(RunStopped, match=message):
        filed(run, streamed(), tmp_path / "run", registry=registry, watch=[watch])
    assert len(events(tmp_path / "run", "epoch")) == epochs
    assert not readers()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("during", ["step", "accuracy", "epoch"])
def test_an_interruption_leaves_no_thread(
    during: str, number: int, streamed: Tiny, filed: Any, registry: Registry, tmp_path: Path
) -> None:
    """Between steps, in evaluation, and where it does not wait."""
    left = [number]

    def watch(event: Event) -> None:
        if event["event"] == during and left:
            os.kill(os.getpid(), left.pop())

    with pytest.raises(Interrupted, match="goes on"):
        filed(run, streamed(), tmp_path / "run", registry=registry, watch=[watch])
    assert not readers()
    filed(resume, tmp_path / "run", registry=registry)
    filed(run, streamed(residence="device"), tmp_path / "whole", registry=registry)
    assert results(tmp_path / "run") == results(tmp_path / "whole")


def test_a_reader_that_hangs_is_interrupted(
    streamed: Tiny, filed: Any, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second signal does not wait for the step; the thread ends once the disk answers."""
    plain, main = StreamedImages.__post_init__, threading.main_thread().ident or 0
    asked, steps = [signal.SIGINT] * 2, []

    def slow(self: StreamedImages) -> None:
        plain(self)
        read = self._read

        def late(row: int, place: Any) -> None:
            while asked:
                signal.pthread_kill(main, asked.pop())
                time.sleep(0.1)
            read(row, place)

        self._read = late

    monkeypatch.setattr(StreamedImages, "__post_init__", slow)
    watch = [lambda event: steps.append(event) if event["event"] == "step" else None]
    with pytest.raises(Interrupted):
        filed(run, streamed(), tmp_path / "run", registry=registry, watch=watch)
    assert not steps
    assert not readers()


GROWTH = """
import os, sys, torch
from pathlib import Path
from cilnorm.data.pixel_cache import _mapped
from cilnorm.training.pixels import Augmentation, Pixels
from cilnorm.training.streamed_images import StreamedImages

path, streamed = Path(sys.argv[1]), sys.argv[2] == "stream"
images = _mapped(path, (2000, 3, 224, 224))
cpu = torch.device("cpu")
pixels = Pixels(StreamedImages(images, cpu, path) if streamed else images, (0.5,) * 3, (0.3,) * 3, Augmentation())

def resident():
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmRSS:") + 1]) / 1024

before, most = 0, 0
for step, batch in enumerate(pixels.read(torch.arange(2000).split(16))):
    if step == 40:  # whatever it needs for its work is there by now
        before = resident()
    most = max(most, resident() - before) if before else 0
pixels.close()
print(most)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' own figures")
def test_memory_does_not_grow_with_the_set(tmp_path: Path) -> None:
    """300 MB read through once: in the last 200, pages of a map count, a stream needs no more than before."""
    with (tmp_path / "pixels.raw").open("wb") as file:
        file.truncate(2000 * 3 * 224 * 224)
    grown = {}
    for where in ("device", "stream"):
        command = [sys.executable, "-c", GROWTH, str(tmp_path / "pixels.raw"), where]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        grown[where] = float(done.stdout)
    assert grown["device"] > 150
    assert grown["stream"] < 20
