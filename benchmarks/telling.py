"""What it costs to tell the rows of a batch, and to have them in any order.

    OMP_NUM_THREADS=1 python -m benchmarks.telling
    OMP_NUM_THREADS=1 python -m benchmarks.telling --only tbbn adab2n --pairs 41

A telling is ``cilnorm.tell_rows`` of a mask over ResNet-32, its end included. A step is forward, loss, backward and
SGD on 48 current and 16 past images of 32 pixels: current first and told by counts, then the same rows shuffled and
told by a mask, right after one another; in channels_last layout, as ``cilnorm run`` has it, unless asked otherwise.
Seconds are CPU time of this process.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

import cilnorm
from cilnorm import registry
from cilnorm.batch import Composition, CompositionAware
from cilnorm.telling import needs_rows

CURRENT, PAST, TASK = 48, 16, 9
VARIANTS = {"tbbn": {"splits": "auto"}}


class Features(nn.Module):
    """Of an embedding (N, dim) and maps, which a backbone returns, the embedding."""

    def forward(self, out: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return out[0]


def network(norm: str, layout: torch.memory_format) -> nn.Module:
    """A ResNet-32 of 100 classes with the norm."""
    torch.manual_seed(0)
    backbone = registry.load().backbones["resnet32"].build(cilnorm.norm_factory("bn"))
    model = nn.Sequential(backbone, Features(), nn.Linear(backbone.dim, 100))
    cilnorm.convert_norms(model, norm, **VARIANTS.get(norm, {}))
    return model.train().to(memory_format=layout)  # type: ignore[call-overload,no-any-return]


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, labels and the task of each row; ten classes a task, current rows first."""
    labels = torch.cat([torch.arange(CURRENT) % 10 + 10 * TASK, torch.arange(PAST) * 10 * TASK // PAST])
    return torch.randn(CURRENT + PAST, 3, 32, 32), labels, labels // 10


def clock(run: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(norm: str, tellings: int, pairs: int, layout: torch.memory_format) -> tuple[float, list[float]]:
    """Seconds of a telling, and ratios of a shuffled step to a sorted one."""
    model = network(norm, layout)
    listens = any(isinstance(module, CompositionAware) for module in model.modules())
    images, labels, tasks = batch()
    order = torch.randperm(CURRENT + PAST, generator=torch.Generator().manual_seed(0))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    # What a loop of one's own has at hand; a mask alone where that is enough.
    more = needs_rows(model)

    def tell(rows: torch.Tensor) -> cilnorm.telling.Telling:
        known = {"tasks": tasks[rows], "labels": labels[rows]} if more else {}
        return cilnorm.tell_rows(model, past=tasks[rows] < TASK, task=TASK, **known)

    def step(rows: torch.Tensor, told: Callable[[], object]) -> Callable[[], None]:
        x, y = images[rows].contiguous(memory_format=layout), labels[rows]

        def run() -> None:
            telling = told()
            optimiser.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimiser.step()
            if isinstance(telling, cilnorm.telling.Telling):
                telling.close()

        return run

    first = torch.arange(CURRENT + PAST)
    count = Composition(CURRENT, PAST, TASK)
    in_order = step(
        first, (lambda: cilnorm.set_composition(model, count)) if listens and not more else lambda: tell(first)
    )
    shuffled = step(order, lambda: tell(order))
    for run in (in_order, shuffled):
        run()
    ratios = []
    for turn in range(pairs):
        both = [clock(run) for run in ((in_order, shuffled) if turn % 2 else (shuffled, in_order))]
        ratios.append(both[1] / both[0] if turn % 2 else both[0] / both[1])
    mask = tasks[order] < TASK
    known = {"tasks": tasks[order], "labels": labels[order]} if more else {}
    spent = [clock(lambda: cilnorm.tell_rows(model, past=mask, task=TASK, **known).close()) for _ in range(tellings)]
    return statistics.median(spent), ratios


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a line a norm."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=["tbbn", "cbbn", "nbn", "spnorm", "adab2n", "tbbn+cn"])
    parser.add_argument("--tellings", type=int, default=301)
    parser.add_argument("--pairs", type=int, default=31)
    parser.add_argument("--contiguous", action="store_true", help="instead of channels_last")
    asked = parser.parse_args(argv)
    layout = torch.contiguous_format if asked.contiguous else torch.channels_last
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {asked.pairs} pairs")
    print("| norm | telling (ms) | shuffled / sorted | quartiles |\n| --- | --: | --: | --- |")
    for norm in asked.only:
        telling, ratios = measure(norm, asked.tellings, asked.pairs, layout)
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"| {norm} | {1000 * telling:.2f} | {middle:.3f} | {low:.3f} to {high:.3f} |", flush=True)


if __name__ == "__main__":
    main()
