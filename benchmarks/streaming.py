"""What streamed images cost: a step with them against one with images at hand, and how fast files and rows are read.

    python -m benchmarks.streaming --preset mini-imagenet --data-root DATA
    python -m benchmarks.streaming --preset mini-imagenet --data-root DATA --rounds 0 --photographs 200

A step is one of FT in the second task of the preset, forward, backward and update, on one thread. Both kinds take one
in turns, in seconds of processor time, the reader's included; the ratio is the median over rounds of the quotient in a
round. Rows are read in random order by the reader alone, batch after batch: after the file was dropped from the
system's cache, and again from there. Photographs are images of the set enlarged to 500 x 375, a common size of
ImageNet's, saved as JPEG and decoded to 256 pixels by one process. Last comes a plan for 126,000 of those.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks.cpu_step import quotients
from cilnorm import registry as registries
from cilnorm.batch import Composition
from cilnorm.data.decoding import decode
from cilnorm.experiment.assembly import assemble
from cilnorm.images import ImageFiles
from cilnorm.method import Phase
from cilnorm.registry import Registry
from cilnorm.spec import Spec, resolve
from cilnorm.training.batches import draw_batches
from cilnorm.training.engine import Engine
from cilnorm.training.epoch_plan import RowSource, plan_epoch
from cilnorm.training.randomness import generator
from cilnorm.training.streamed_images import StreamedImages

CPU = torch.device("cpu")
WARM_UP = 2
PLANNED, STORED, PHOTOGRAPH = 126_000, 256, (500, 375)


def stepper(spec: Spec, registry: Registry, root: Path | None) -> Callable[[], Any]:
    """Takes a step of the second task whenever called; 20 images of each old class are its memory."""
    parts = assemble(spec, registry, CPU, root)
    first, task = parts.stream.tasks[:2]
    for each in (first, task):
        parts.net.grow(each.new)
    memory = torch.cat([rows[:20] for rows in parts.stream.by_class(first)])
    engine = Engine(parts.net, parts.method, task, Phase(), spec.schedule, None)
    sources = [RowSource(parts.stream.train(task), spec.rows[0], "current"), RowSource(memory, spec.rows[1], "past")]

    def endless() -> Iterator[None]:
        for epoch in range(10**6):
            engine.start_epoch(epoch % spec.schedule.epochs)
            plan = plan_epoch(sources, Composition(*spec.rows, task.index), spec.protocol, 0, (1, 0), epoch)
            batches = draw_batches(plan, parts.train, parts.stream.targets, generator(0, "views", epoch))
            yield from engine.epoch(batches)

    steps = endless()
    return lambda: next(steps)


def race(spec: Spec, registry: Registry, root: Path | None, rounds: int) -> dict[str, list[float]]:
    """Processor seconds of each step; who begins a round changes."""
    steps = {kind: stepper(replace(spec, residence=kind), registry, root) for kind in ("device", "stream")}  # type: ignore[arg-type]
    seconds: dict[str, list[float]] = {kind: [] for kind in steps}
    for number in range(-WARM_UP, rounds):
        for kind in sorted(steps, reverse=bool(number % 2)):
            start = time.process_time()
            steps[kind]()
            if number >= 0:
                seconds[kind].append(time.process_time() - start)
    return seconds


def read_rates(images: Tensor, path: Path, rows: int, batches: int) -> dict[str, float]:
    """Images a second, as the reader gives them out, from the disk first and then from the system's cache."""
    found = {}
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: rows * batches]
    for kind in ("disk", "cache"):
        if kind == "disk" and hasattr(os, "posix_fadvise"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        streamed = StreamedImages(images, CPU, path)
        start, processor = time.perf_counter(), time.process_time()
        for _ in streamed.read(order.split(rows)):
            pass
        found[f"{kind}, images a second"] = len(order) / (time.perf_counter() - start)
        found[f"{kind}, processor µs an image"] = 1e6 * (time.process_time() - processor) / len(order)
        streamed.close()
    return {name: round(value, 1) for name, value in found.items()}


def made_up(folder: Path, side: int, count: int) -> tuple[Tensor, Path]:
    """A file of noise as a cache holds images, and the images."""
    path = folder / "pixels.raw"
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)
    path.write_bytes(images.numpy().tobytes())
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return images, path


def decode_rate(paths: Sequence[Path], size: int) -> float:
    """Images a second of processor time that one process decodes."""
    start = time.process_time()
    for path in paths:
        decode(path, size)
    return round(len(paths) / (time.process_time() - start), 1)


def photographs(source: ImageFiles, folder: Path, count: int) -> list[Path]:
    """Images of a set, enlarged and saved as photographs are."""
    paths = []
    for number, (name, _) in enumerate(source.train[:: max(1, len(source.train) // count)][:count]):
        paths.append(folder / f"{number}.jpg")
        with Image.open(source.root / name) as image:
            image.convert("RGB").resize(PHOTOGRAPH, Image.Resampling.BICUBIC).save(paths[-1], quality=92)
    return paths


def measure(spec: Spec, registry: Registry, root: Path | None, rounds: int, batches: int, count: int) -> dict[str, Any]:
    """All figures; ``count`` photographs and as many rows of their size are made up."""
    source = registry.datasets[spec.dataset].build(root, **spec.dataset_options)
    start = time.perf_counter()
    parts = assemble(spec, registry, CPU, root)
    images, rows = parts.images, sum(spec.rows)
    assert images.file is not None
    found: dict[str, Any] = {
        "images": len(images.train_images) + len(images.test_images),
        "cache, MB": round(images.file.stat().st_size / 1e6, 1),
        "opening, s": round(time.perf_counter() - start, 1),
        "reading": read_rates(images.train_images, images.file, rows, batches),
    }
    if rounds:
        seconds = race(spec, registry, root, rounds)
        found["step, s"] = {kind: round(statistics.median(each), 3) for kind, each in seconds.items()}
        found["stream / device"] = quotients(seconds["stream"], seconds["device"])
    if count:
        some = source.train[:: max(1, len(source.train) // count)][:count]
        found["decoding, images a second"] = decode_rate([source.root / name for name, _ in some], source.size)
        with tempfile.TemporaryDirectory() as folder:
            paths = photographs(source, Path(folder), count)
            found["photographs, KB"] = round(sum(path.stat().st_size for path in paths) / len(paths) / 1e3, 1)
            found["decoding photographs, images a second"] = decode_rate(paths, STORED)
            found["reading photographs"] = read_rates(*made_up(Path(folder), STORED, 4 * count), rows, batches)
        found["plan"] = plan(found)
    return found


def plan(found: dict[str, Any]) -> dict[str, float]:
    """Seconds that one process decodes 126,000 photographs once, and that an epoch of them takes to be read."""
    reading = found["reading photographs"]
    return {
        "cache, GB": round(PLANNED * 3 * STORED**2 / 1e9, 1),
        "decoding once, s": round(PLANNED / found["decoding photographs, images a second"]),
        "an epoch from the disk, s": round(PLANNED / reading["disk, images a second"]),
        "an epoch from the cache, s": round(PLANNED / reading["cache, images a second"]),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the figures as JSON."""
    parser = argparse.ArgumentParser(description="What streamed images cost.")
    parser.add_argument("--preset", default="mini-imagenet")
    parser.add_argument("--data-root", type=Path, help="folder of its data set")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each kind; 0 for none")
    parser.add_argument("--batches", type=int, default=100, help="that are read, each in either way")
    parser.add_argument("--photographs", type=int, default=0, help="that are made and decoded; 0 for none")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    registry = registries.load()
    spec = resolve(given.preset, registry)
    found = measure(spec, registry, given.data_root, given.rounds, given.batches, given.photographs)
    print(json.dumps({"preset": given.preset, "rounds": given.rounds, **found}, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
