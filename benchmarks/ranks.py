"""How many steps a second several processes take together, against one: ResNet-18 at 84 pixels on the CPU.

    OMP_NUM_THREADS=1 python -m benchmarks.ranks --rounds 11
    OMP_NUM_THREADS=1 python -m benchmarks.ranks --ranks 4 --norm tbbn

A step is one of fine-tuning in the second of two tasks, 48 current and 16 past rows in all, whatever the number of
processes, each of one thread; they talk by gloo. A round is some steps of the one process, then as many of the others
together, by the clock; what is printed is the median over rounds of the quotient, which needs a machine that has
nothing else to do. The load of the machine is printed beside it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

CURRENT, PAST = 48, 16


def steps(rank: int, ranks: int, norm: str, side: int) -> Iterator[None]:
    """Endlessly many steps of a process, in step with the others."""
    import torch

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
    from cilnorm.training.ranks import joined

    torch.set_num_threads(1)
    registry, device = registries.load(extra=[random_images]), torch.device("cpu")
    data = {"dataset.classes": 20, "dataset.train": 50, "dataset.test": 1, "dataset.size": side, "tasks": 2}
    asked = {"method": "ft", "norm": norm, "backbone": "resnet18", "dataset": "random-images", "memory": 200, **data}
    spec = resolve("cifar100", registry, rows=(CURRENT, PAST), **asked)
    with joined(Place(rank, ranks, rank, ranks), device) as together:
        parts = assemble(spec, registry, device, None, together)
        for task in parts.stream.tasks:
            parts.net.grow(task.new)
        stored = torch.cat([rows[:20] for rows in parts.stream.by_class(parts.stream.tasks[0])])
        sources = [RowSource(parts.stream.train(task), CURRENT, "current"), RowSource(stored, PAST, "past")]
        with together.training(parts.net):
            engine = Engine(parts.net, parts.method, task, Phase(), spec.schedule, None, ranks=together)
            for epoch in range(10**6):
                engine.start_epoch(0)
                plan = plan_epoch(sources, Composition(CURRENT, PAST, task.index), spec.protocol, 0, (1, 0), epoch)
                drawn = generator(0, "views", epoch)
                yield from engine.epoch(draw_batches(plan, parts.train, parts.stream.targets, drawn, ranks=together))


def serve(rank: int, ranks: int, meeting: Path, line: Connection, how: tuple[str, int]) -> None:
    """Takes as many steps as it is told, and says how many seconds that took."""
    from torch import distributed

    if ranks > 1:
        store, patience = distributed.FileStore(str(meeting), ranks), timedelta(minutes=30)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=patience)
    endless = steps(rank, ranks, *how)
    while count := line.recv():
        began = time.perf_counter()
        for _ in range(count):
            next(endless)
        line.send(time.perf_counter() - began)
    os._exit(0)


def start(ranks: int, meeting: Path, how: tuple[str, int]) -> list[Connection]:
    """The lines to so many processes that take steps together."""
    lines, context = [], multiprocessing.get_context("spawn")
    for rank in range(ranks):
        mine, theirs = multiprocessing.Pipe()
        context.Process(target=serve, args=(rank, ranks, meeting, theirs, how), daemon=True).start()
        lines.append(mine)
    return lines


def seconds(lines: Sequence[Connection], count: int) -> float:
    """How long the slowest of the processes took for so many steps."""
    for line in lines:
        line.send(count)
    return max(line.recv() for line in lines)


def compare(ranks: int, rounds: int, count: int, norm: str, side: int) -> list[tuple[float, float]]:
    """Seconds a step of one process, and of several together, a pair a round; a first round is left out."""
    with tempfile.TemporaryDirectory() as folder:
        one, several = (start(n, Path(folder) / str(n), (norm, side)) for n in (1, ranks))
        found = [(seconds(one, count) / count, seconds(several, count) / count) for _ in range(rounds + 1)]
        for line in (*one, *several):
            line.send(0)
    return found[1:]


def main() -> None:
    """Prints the median quotient, its quartiles, and the load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--steps", type=int, default=3, help="of a round")
    parser.add_argument("--norm", default="tbbn")
    parser.add_argument("--side", type=int, default=84)
    asked = parser.parse_args()
    found = compare(asked.ranks, asked.rounds, asked.steps, asked.norm, asked.side)
    low, middle, high = statistics.quantiles([one / several for one, several in found], n=4, method="inclusive")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    where = f"ResNet-18 with {asked.norm} at {asked.side} px, {os.cpu_count()} cores, load {load:.1f}"
    spread = f"quartiles {low:.2f} to {high:.2f}, {asked.rounds} rounds"
    print(f"{asked.ranks} processes take {middle:.2f} times the steps a second of one ({spread}; {where})")


if __name__ == "__main__":
    main()
