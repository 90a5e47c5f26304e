"""How many steps a second several processes take together, against one: ResNet-18 at 84 pixels on the CPU.

    OMP_NUM_THREADS=1 python -m benchmarks.ranks --norm bn
    OMP_NUM_THREADS=1 python -m benchmarks.ranks --norm tbbn --ranks 2 --rounds 11

A step is one of fine-tuning in the second of two tasks, 48 current and 16 past rows in all, whatever the number of
processes, each of one thread; they talk by gloo. A round is some steps of the one process, then as many of the others
together, by the clock, then as many of each of them apart: on as many rows, with nothing to tell each other, which is
the most that the machine's cores can give side by side. What is printed are medians over rounds of the quotients, which
need a machine that has nothing else to do; its load is printed beside them. The quotient of the processors' time, which
waits for nobody, is what is left of them on a busy one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import distributed

from benchmarks import random_images
from cilnorm import registry as registries
from cilnorm.batch import Composition
from cilnorm.experiment.assembly import assemble
from cilnorm.method import Phase
from cilnorm.spec import resolve
from cilnorm.training.batches import draw_batches
from cilnorm.training.engine import Engine
from cilnorm.training.epoch_plan import RowSource, plan_epoch
from cilnorm.training.place import Place
from cilnorm.training.randomness import generator
from cilnorm.training.ranks import ALONE, Ranks

CURRENT, PAST = 48, 16
LIMIT = 600.0  # seconds in which the processes must answer
METHOD = "forkserver" if sys.platform == "linux" else "spawn"


def steps(ranks: Ranks, norm: str, side: int, part: int = 1) -> Iterator[None]:
    """Endlessly many steps of a process, in step with the others, on batches of a ``part``-th of the rows."""
    current, past = CURRENT // part, PAST // part
    registry, device = registries.load(extra=[random_images]), torch.device("cpu")
    data = {"dataset.classes": 20, "dataset.train": 50, "dataset.test": 1, "dataset.size": side, "tasks": 2}
    asked = {"method": "ft", "norm": norm, "backbone": "resnet18", "dataset": "random-images", "memory": 200, **data}
    spec = resolve("cifar100", registry, rows=(current, past), **asked)
    parts = assemble(spec, registry, device, None, ranks)
    for task in parts.stream.tasks:
        parts.net.grow(task.new)
    stored = torch.cat([rows[:20] for rows in parts.stream.by_class(parts.stream.tasks[0])])
    sources = [RowSource(parts.stream.train(task), current, "current"), RowSource(stored, past, "past")]
    with ranks.training(parts.net):
        engine = Engine(parts.net, parts.method, task, Phase(), spec.schedule, None, ranks=ranks)
        for epoch in range(10**6):
            engine.start_epoch(0)
            plan = plan_epoch(sources, Composition(current, past, task.index), spec.protocol, 0, (1, 0), epoch)
            drawn = generator(0, "views", epoch)
            yield from engine.epoch(draw_batches(plan, parts.train, parts.stream.targets, drawn, ranks=ranks))


def serve(rank: int, ranks: int, meeting: Path | None, line: Connection, how: tuple[str, int]) -> None:
    """Takes as many steps as it is told, and says how many seconds that took; by itself if there is no meeting."""
    torch.set_num_threads(1)
    together = ALONE
    if meeting:
        store = distributed.FileStore(str(meeting), ranks)
        patience = timedelta(seconds=LIMIT)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=patience)
        together = Ranks(Place(rank, ranks, rank, ranks), distributed.group.WORLD, distributed.group.WORLD)
    endless = steps(together, *how, part=1 if meeting else ranks)
    while count := line.recv():
        began, worked = time.perf_counter(), time.process_time()
        for _ in range(count):
            next(endless)
        line.send((time.perf_counter() - began, time.process_time() - worked))
    os._exit(0)


def start(ranks: int, meeting: Path | None, how: tuple[str, int]) -> list[Connection]:
    """The lines to so many processes that take steps together, or apart if there is no meeting."""
    lines, context = [], multiprocessing.get_context(METHOD)
    for rank in range(ranks):
        mine, theirs = multiprocessing.Pipe()
        context.Process(target=serve, args=(rank, ranks, meeting, theirs, how), daemon=True).start()
        lines.append(mine)
    return lines


def seconds(lines: Sequence[Connection], count: int) -> tuple[float, float]:
    """How long the slowest of the processes took for a step of so many, by the clock and of its processor's time.

    Raises:
        TimeoutError: one does not answer.
    """
    for line in lines:
        line.send(count)
    found = []
    for line in lines:
        if not line.poll(LIMIT):
            raise TimeoutError(f"a process did not take {count} steps within {LIMIT:.0f} s")
        found.append(line.recv())
    clock, worked = (max(side) / count for side in zip(*found, strict=True))
    return clock, worked


def compare(ranks: int, rounds: int, count: int, norm: str, side: int) -> list[list[tuple[float, float]]]:
    """Seconds a step of one process, of several together, and of these apart, round by round; see ``seconds``."""
    if METHOD == "forkserver":
        multiprocessing.set_forkserver_preload(
            ["cilnorm.experiment.runner", "benchmarks.random_images"]
        )  # so that all is imported once
    with tempfile.TemporaryDirectory() as folder:
        whole = start(1, None, (norm, side))
        sides = whole, start(ranks, Path(folder) / "store", (norm, side)), start(ranks, None, (norm, side))
        for lines in sides:
            seconds(lines, 1)  # warm up
        found = [[seconds(lines, count) for lines in sides] for _ in range(rounds)]
        for line in (line for lines in sides for line in lines):
            line.send(0)
    return found


def spread(values: Sequence[float]) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    """Prints the median quotient, its quartiles, and the load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--steps", type=int, default=1, help="of a round")
    parser.add_argument("--norm", default="tbbn")
    parser.add_argument("--side", type=int, default=84, help="pixels of an image")
    asked = parser.parse_args()
    found = compare(asked.ranks, asked.rounds, asked.steps, asked.norm, asked.side)
    alone, shared = (statistics.median(each[at][0] for each in found) for at in (0, 1))
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    where = f"ResNet-18 with {asked.norm} at {asked.side} px, {os.cpu_count()} cores, load {load:.1f}"
    print(f"{where}; {alone:.3f} s a step alone, {shared:.3f} shared; median of {asked.rounds} rounds, quartiles")
    for kind, name in enumerate(("by the clock", "in processors' time")):
        shares, apart = (spread([each[0][kind] / each[at][kind] for each in found]) for at in (1, 2))
        print(f"{asked.ranks} processes against one, {name}: {shares} if they share a run, {apart} apart")


if __name__ == "__main__":
    main()
