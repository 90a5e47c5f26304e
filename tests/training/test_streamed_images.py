"""Images that are read ahead of the device: the same rows in the same order, in bounded memory, errors at once."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cilnorm.registry import Registry
from cilnorm.training import streamed_images
from cilnorm.training.batches import EpochBatches
from cilnorm.training.engine import Engine
from cilnorm.training.fast_engines import CapturedEngine
from cilnorm.training.pixels import Pixels
from cilnorm.training.precision import matmul_precision
from cilnorm.training.streamed_images import AHEAD, StreamedImages, fits, free_memory
from tests.training.test_engine import CPU, Remembered, epochs, learned, learner

COUNT, START = 40, 7


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (COUNT, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["array", "file"])
def streamed(request: pytest.FixtureRequest, images: Tensor, tmp_path: Path) -> Iterator[StreamedImages]:
    """The images from memory, and from within a file; no thread may be left behind."""
    path = tmp_path / "pixels"
    path.write_bytes(bytes(START) + images.numpy().tobytes() + bytes(11))
    whole = StreamedImages(images, CPU) if request.param == "array" else StreamedImages(images, CPU, path, START)
    yield whole
    whole.close()
    assert not readers()


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("cilnorm-images")]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def parts_of(*sizes: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randint(0, COUNT, (size,), generator=random) for size in sizes]


def test_parts_come_in_order_with_the_rows_that_indexing_gives(streamed: StreamedImages, images: Tensor) -> None:
    parts = parts_of(6, 6, 1, 9, 0, 6, 6, 3)
    assert [part.tolist() for part in streamed.read(parts)] == [images[part].tolist() for part in parts]
    assert torch.equal(streamed[parts[3]], images[parts[3]])
    assert list(streamed.read([])) == []
    assert streamed.shape == images.shape


def test_a_tensor_given_for_them_takes_each_part(streamed: StreamedImages, images: Tensor) -> None:
    parts, place = torch.stack(parts_of(6, 6, 6, 6, 6, 6)), torch.zeros(6, 3, 4, 5, dtype=torch.uint8)
    for part, given in zip(parts, streamed.read(parts, place), strict=True):
        assert given.data_ptr() == place.data_ptr()
        assert torch.equal(place, images[part])


def test_what_is_handed_out_stays_until_the_next_is_asked_for(streamed: StreamedImages, images: Tensor) -> None:
    """However long the reading of the following parts has been done."""
    parts = parts_of(*[6] * 12)
    for at, given in enumerate(streamed.read(parts)):
        time.sleep(0.002)
        assert torch.equal(given, images[parts[at]])


def test_a_few_parts_are_read_ahead_and_no_more(images: Tensor) -> None:
    read: list[int] = []
    streamed = StreamedImages(images, CPU)
    plain = streamed._read
    streamed._read = lambda row, place: (read.append(row), plain(row, place))[1]
    parts = [torch.tensor([at]) for at in range(20)]
    given = streamed.read(parts)
    next(given)
    wait_for(lambda: len(read) == AHEAD)
    next(given)
    wait_for(lambda: len(read) == AHEAD + 1)
    time.sleep(0.02)
    assert read == list(range(AHEAD + 1))
    streamed.close()


def test_large_parts_are_read_two_at_a_time(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed_images, "AHEAD_BYTES", 6 * images[0].nbytes)
    made: list[int] = []
    plain = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **rest: (made.append(shape[0]), plain(*shape, **rest))[1])
    for rows, buffers in ((100, 2), (6, 2), (2, 3), (1, 4)):
        made.clear()
        streamed = StreamedImages(images, CPU)
        list(streamed.read(parts_of(*[rows] * 9)))
        streamed.close()
        assert made == [rows] * buffers


def test_an_error_of_a_later_part_is_raised_at_once(images: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "pixels"
    path.write_bytes(images.numpy().tobytes())
    streamed = StreamedImages(images, CPU, path)
    with path.open("r+b") as file:
        file.truncate(25 * images[0].nbytes + 1)
    given = streamed.read([torch.tensor([0, 1]), torch.tensor([2]), torch.tensor([25]), torch.tensor([3])])
    next(given)
    wait_for(lambda: streamed._ask(streamed_images._Slot(torch.empty(0, 3, 4, 5)), torch.tensor([])).done())
    with pytest.raises(OSError, match="ends within image 25") as raised:
        next(given)
    assert raised.value.filename == str(path)
    streamed.close()
    assert not readers()


def test_rows_that_are_not_there(streamed: StreamedImages) -> None:
    with pytest.raises(IndexError):
        streamed[torch.tensor([COUNT])]
    if streamed.file is not None:
        with pytest.raises(IndexError, match=r"pixels has 40 images from byte 7 on, no image -1"):
            streamed[torch.tensor([-1])]


def test_a_file_that_is_not_there(images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        StreamedImages(images, CPU, tmp_path / "none")


def test_no_thread_outlives_its_images(images: Tensor) -> None:
    """Closed in the midst of a pass, or forgotten without a word."""
    streamed = StreamedImages(images, CPU)
    given = streamed.read(parts_of(*[6] * 20))
    next(given)
    assert readers()
    streamed.close()
    assert not readers()
    assert len(streamed[torch.tensor([3])]) == 1
    del streamed, given
    gc.collect()
    wait_for(lambda: not readers())


def test_an_error_of_who_uses_them_stops_the_reading(images: Tensor) -> None:
    read: list[int] = []
    streamed = StreamedImages(images, CPU)
    streamed._read = lambda row, place: read.append(row)
    given = streamed.read([torch.tensor([at]) for at in range(20)])
    next(given)
    with pytest.raises(ZeroDivisionError):
        given.throw(ZeroDivisionError)  # type: ignore[attr-defined]
    streamed.close()
    assert len(read) <= AHEAD
    assert not readers()


def test_what_fits_takes_at_most_half_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 4000))
    cuda = torch.device("cuda", 0)
    assert fits(500, cuda)
    assert not fits(501, cuda)
    free = free_memory(CPU)
    assert free is None or 1 << 20 < free < 1 << 50
    monkeypatch.setattr(streamed_images, "free_memory", lambda device: None)
    assert fits(1 << 60, torch.device("meta"))


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, none = tmp_path / "limit", tmp_path / "none"
    limit.write_text("4096\n")
    none.write_text("max\n")
    monkeypatch.setattr(streamed_images, "LIMITS", (str(none), str(tmp_path / "missing"), str(limit)))
    assert free_memory(CPU) == 4096


# Epochs and steps


def streamed_epochs(count: int = 3, device: torch.device = CPU) -> list[EpochBatches]:
    """The epochs of ``epochs``, their images streamed."""
    feeds = epochs(device, count=count)
    images = feeds[0].pixels.images
    assert isinstance(images, Tensor)
    pixels = Pixels(StreamedImages(images.cpu(), device), (0.5,) * 3, (0.3,) * 3, feeds[0].pixels.augmentation)
    return [EpochBatches(pixels, f.indices.cpu(), f.targets, f.views, f.composition) for f in feeds]


def test_streamed_batches_are_those_of_images_at_hand() -> None:
    [one], [other] = epochs(CPU, count=1), streamed_epochs(1)
    for first in (0, 2):
        pairs = list(zip(one.batches(first), other.batches(first), strict=True))
        assert len(pairs) == len(one) - first
        assert all(torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets) for a, b in pairs)
    assert torch.equal(one.batch(1).images, other.batch(1).images)
    some = [torch.arange(5), torch.arange(7, 9)]
    clean = zip(one.pixels.clean_parts(some), other.pixels.clean_parts(some), some, strict=True)
    assert all(torch.equal(a, b) and torch.equal(a, one.pixels.clean(part)) for a, b, part in clean)
    other.pixels.close()


def test_a_captured_step_reads_staged_images_at_one_address() -> None:
    one, other = streamed_epochs(2)
    held = one.clone()
    assert held.staged is not None
    address = held.staged.data_ptr()
    assert torch.equal(held.batch(torch.tensor([0])).images, one.batch(0).images)
    held.copy_(other)
    steps = enumerate(held.stage(other, 1), 1)
    for step, _ in steps:
        assert torch.equal(held.batch(torch.tensor([step])).images, other.batch(step).images)
    assert step == len(other) - 1
    assert held.staged.data_ptr() == address
    one.pixels.close()


@pytest.mark.slow
@pytest.mark.parametrize("made", [Engine, Remembered])
@pytest.mark.parametrize("method", ["ft", "eeil", "lucir"])
def test_streamed_steps_give_the_same_bits(registry: Registry, method: str, made: type[Engine]) -> None:
    """Eager, and with all that surrounds a capture."""
    terms, weights = learned(learner(Engine, registry, method), epochs(CPU))
    feeds = streamed_epochs()
    again, same = learned(learner(made, registry, method), feeds)
    feeds[0].pixels.close()
    assert again == terms
    assert all(torch.equal(same[name], tensor) for name, tensor in weights.items())
    assert not readers()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_sees_the_same_rows(images: Tensor) -> None:
    """More batches than there are buffers, queued faster than the device takes them."""
    cuda, rows = torch.device("cuda", 0), torch.from_numpy(np.arange(64 * COUNT) % COUNT).view(-1, 16)
    streamed = StreamedImages(images, cuda)
    sums = []
    for given in streamed.read(rows):
        sums.append(given.long().sum((1, 2, 3)))
        torch.randn(2000, 2000, device=cuda) @ torch.randn(2000, 2000, device=cuda)
    streamed.close()
    assert torch.equal(torch.stack(sums).cpu(), images.long().sum((1, 2, 3))[rows])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_step_on_a_gpu_takes_streamed_images(registry: Registry) -> None:
    """What the eager engine learns from images at hand, in 40 epochs of five steps."""
    cuda = torch.device("cuda", 0)
    feeds = streamed_epochs(40, cuda)
    with matmul_precision("fp32"):
        terms = learned(learner(Engine, registry, "lucir", cuda), epochs(cuda, count=40))[0]
        engine = learner(CapturedEngine, registry, "lucir", cuda)
        again = learned(engine, feeds)[0]
    feeds[0].pixels.close()
    assert not engine._refused
    for one, other in zip(terms, again, strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-3)
