"""What a training step costs on the CPU: ours against a plain PyTorch loop, and TBBN against batch norm.

    python -m benchmarks.cpu_step --data-root DATA        real CIFAR-100; random images of its size without
    python -m benchmarks.cpu_step --rounds 61
    python -m benchmarks.cpu_step --only ft+bn "ft+bn bf16" "ft+tbbn bf16"

A step is one of FT in the tenth task of ten classes on CIFAR-100, all of it: 48 current and 16 past rows are drawn,
cropped, resized, mirrored and normalised; then forward, loss, backward, clip and SGD, on one thread. The plain loop has
two data loaders with torchvision's transforms, the same network with torch's ``BatchNorm2d`` in torch's default layout,
and reads the loss every step. ``compiled`` is ``engine: compile``; ``bf16`` is ``precision: bf16``, of use only where
the processor has instructions for it (avx512_bf16, amx_bf16). Each contestant is a process of its own; a round is a
step of each, one after another in turns, in seconds of processor time, and a ratio is the median over rounds of the
quotient within a round.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

CURRENT, PAST, TASKS = 48, 16, 10
WARM_UP = 3  # the first compiles; what it compiled may want another look at the second
Step = Callable[[], None]
EngineName = Literal["eager", "compile"]
PrecisionName = Literal["fp32", "bf16"]


def stream(root: Path | None, norm: str, backbone: str) -> Any:
    """Parts of a CIFAR-100 run in its tenth task, and 20 images of each old class as its memory."""
    import torch

    from benchmarks import random_images
    from cilnorm import registry as registries
    from cilnorm.experiment.assembly import assemble
    from cilnorm.spec import resolve

    registry = registries.load(extra=[random_images])
    data = {"dataset": "cifar100"} if root else {"dataset": "random-images", "dataset.train": 100, "dataset.test": 1}
    spec = resolve("cifar100", registry, method="ft", norm=norm, backbone=backbone, **data)
    parts = assemble(spec, registry, torch.device("cpu"), root)
    for task in parts.stream.tasks:
        parts.net.grow(task.new)
    memory = torch.cat([rows[:20] for task in parts.stream.tasks[:-1] for rows in parts.stream.by_class(task)])
    return spec, parts, memory


def ours(root: Path | None, norm: str, backbone: str, engine: EngineName, precision: PrecisionName) -> Step:
    """A step as the runner takes it, the epoch's plan shared among its steps."""
    import torch

    from cilnorm.batch import Composition
    from cilnorm.method import Phase
    from cilnorm.training.batches import draw_batches
    from cilnorm.training.epoch_plan import RowSource, plan_epoch
    from cilnorm.training.fast_engines import engine_class
    from cilnorm.training.randomness import generator

    spec, parts, memory = stream(root, norm, backbone)
    task = parts.stream.tasks[-1]
    kind = engine_class(engine, torch.device("cpu"))
    made = kind(parts.net, parts.method, task, Phase(), spec.schedule, None, precision=precision)
    sources = [RowSource(parts.stream.train(task), CURRENT, "current"), RowSource(memory, PAST, "past")]

    def endless() -> Iterator[None]:
        for epoch in range(10**6):
            made.start_epoch(epoch % spec.schedule.epochs)
            plan = plan_epoch(sources, Composition(CURRENT, PAST, task.index), spec.protocol, 0, (9, 0), epoch)
            yield from made.epoch(draw_batches(plan, parts.train, parts.stream.targets, generator(0, "views", epoch)))
            made.finish_epoch()

    steps = endless()
    return lambda: next(steps)


def plain(root: Path | None, norm: str, backbone: str, engine: EngineName, precision: PrecisionName) -> Step:
    """A step of the loop that one would write without this package; ``engine`` and ``precision`` are ours alone."""
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    spec, parts, memory = stream(root, norm, backbone)
    images, targets = parts.images.train_images.permute(0, 2, 3, 1).contiguous().numpy(), parts.stream.targets.tolist()
    transform = transforms.Compose(
        [
            transforms.Pad(4),
            transforms.RandomResizedCrop(32),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(parts.images.mean, parts.images.std),
        ]
    )

    class Rows(Dataset):  # type: ignore[type-arg]
        def __init__(self, indices: list[int]) -> None:
            self.indices = indices

        def __len__(self) -> int:
            return len(self.indices)

        def __getitem__(self, at: int) -> tuple[Any, int]:
            return transform(Image.fromarray(images[self.indices[at]])), targets[self.indices[at]]

    current = Rows(parts.stream.train(parts.stream.tasks[-1]).tolist())
    loaders = [
        DataLoader(rows, size, shuffle=True, drop_last=True)
        for rows, size in ((current, CURRENT), (Rows(memory.tolist()), PAST))
    ]
    net = parts.net.to(memory_format=torch.contiguous_format)
    for name, module in list(net.named_modules()):
        if hasattr(module, "running_var"):
            net.set_submodule(name, torch.nn.BatchNorm2d(module.num_features))
    schedule = spec.schedule
    optimizer = torch.optim.SGD(net.parameters(), schedule.lr, schedule.momentum, weight_decay=schedule.weight_decay)

    def endless() -> Iterator[float]:
        net.train()
        while True:
            for (x, y), (past_x, past_y) in zip(*loaders, strict=False):
                optimizer.zero_grad()
                logits = net(torch.cat([x, past_x])).logits
                loss = torch.nn.functional.cross_entropy(logits, torch.cat([y, past_y]))
                loss.backward()
                torch.nn.utils.clip_grad_norm_(net.parameters(), schedule.clip)
                optimizer.step()
                yield loss.item()

    steps = endless()

    def step() -> None:
        next(steps)

    return step


CONTESTANTS: dict[str, tuple[Any, str, EngineName, PrecisionName]] = {
    "plain": (plain, "bn", "eager", "fp32"),
    "ft+bn": (ours, "bn", "eager", "fp32"),
    "ft+tbbn": (ours, "tbbn", "eager", "fp32"),
    "ft+bn bf16": (ours, "bn", "eager", "bf16"),
    "ft+tbbn bf16": (ours, "tbbn", "eager", "bf16"),
    "ft+bn compiled": (ours, "bn", "compile", "fp32"),
    "ft+tbbn compiled": (ours, "tbbn", "compile", "fp32"),
}
RATIOS = (
    ("plain", "ft+bn"),
    ("ft+tbbn", "ft+bn"),
    ("ft+tbbn bf16", "ft+bn"),
    ("ft+tbbn bf16", "ft+bn bf16"),
    ("plain", "ft+bn compiled"),
    ("ft+tbbn compiled", "ft+bn compiled"),
)


def contestant(name: str, root: Path | None, backbone: str, pipe: Connection) -> None:
    """Takes a step whenever asked to, and answers with its seconds."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    make, norm, engine, precision = CONTESTANTS[name]
    step = make(root, norm, backbone, engine, precision)
    for _ in range(WARM_UP):
        step()
    pipe.send(0.0)
    while pipe.recv():
        start = time.process_time()
        step()
        pipe.send(time.process_time() - start)


def race(root: Path | None, backbone: str, rounds: int, only: Sequence[str] = ()) -> dict[str, list[float]]:
    """Seconds of every step of every contestant; who begins a round changes."""
    context = multiprocessing.get_context("spawn")
    pipes, processes, names = {}, [], list(only or CONTESTANTS)
    for name in names:
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=contestant, args=(name, root, backbone, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes[name].recv()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            pipes[name].send(True)
            seconds[name].append(pipes[name].recv())
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send(False)
        process.join()
    return seconds


def quotients(over: list[float], under: list[float]) -> dict[str, float]:
    """Median and quartiles over rounds of one contestant's seconds in units of another's."""
    found = sorted(a / b for a, b in zip(over, under, strict=True))
    low, median, high = statistics.quantiles(found, n=4) if len(found) > 1 else found * 3
    return {"median": round(median, 3), "low": round(low, 3), "high": round(high, 3)}


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the ratios, then JSON."""
    parser = argparse.ArgumentParser(description="A CPU step in units of a plain PyTorch loop's.")
    parser.add_argument("--data-root", type=Path, help="folder of CIFAR-100; random images if left out")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--backbone", default="resnet32")
    parser.add_argument("--only", nargs="+", choices=list(CONTESTANTS), metavar="NAME", help="; ".join(CONTESTANTS))
    given = parser.parse_args(argv)
    seconds = race(given.data_root, given.backbone, given.rounds, given.only or ())
    pairs = [(over, under) for over, under in RATIOS if over in seconds and under in seconds]
    found = {f"{over} / {under}": quotients(seconds[over], seconds[under]) for over, under in pairs}
    for name, each in seconds.items():
        print(f"{name}: {1000 * statistics.median(each):.0f} ms a step")
    for name, each in found.items():
        print(f"{name}: {each['median']:.2f} (quartiles {each['low']:.2f} to {each['high']:.2f})")
    print(json.dumps({"rounds": given.rounds, "backbone": given.backbone, **found}))


if __name__ == "__main__":
    main()
