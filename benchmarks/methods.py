"""What a step of each method costs, in units of a step of FT and one forward pass of a teacher; and what herding costs.

    python -m benchmarks.methods                     every method, ResNet-32, on the CPU with one thread
    python -m benchmarks.methods --only lucir --pairs 21 --backbone resnet14
    python -m benchmarks.methods --device cuda

A step is that of the main phase of the tenth task of ten classes, 48 current and 16 past rows of 32x32 pixels. A ratio
is the median over pairs of steps right after one another. Herding picks 200 exemplars of each of ten classes of 500
embeddings of 64 dimensions.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.norms import Run, seconds, time_ratio
from cilnorm import registry as registries
from cilnorm.batch import Batch, Composition, Task
from cilnorm.method import Method, Schedule
from cilnorm.registry import Registry
from cilnorm.training.engine import Engine
from cilnorm.training.memory import HERDINGS

SIZES = (10,) * 10
COMPOSITION = Composition(48, 16, 9)


def some_batch(device: str) -> Batch:
    """48 rows of the newest ten classes, 16 of the ninety before."""
    targets = torch.cat([torch.randint(90, 100, (48,)), torch.randint(0, 90, (16,))])
    stored = {"logits": torch.randn(64, 90, device=device)}
    return Batch(torch.randn(64, 3, 32, 32, device=device), targets.to(device), COMPOSITION, stored)


def engine(method: Method, registry: Registry, backbone: str, norm: str, device: str) -> Engine:
    """A method in the main phase of its tenth task."""
    torch.manual_seed(0)
    build = registry.backbones[backbone].build
    net = method.network(lambda: build(registry.norms[norm].build, signed_embedding=method.signed_embedding))
    net = net.to(device, memory_format=torch.channels_last)
    for index in range(9):
        net.grow(SIZES[index])
    past = method.remember(net.to(device), Task(8, SIZES), lambda: [earlier(device)])
    method.grow(net, Task(9, SIZES), lambda: [torch.randn(20, net.head.dim, device=device) for _ in range(10)])
    net.to(device).observe(COMPOSITION)
    task = Task(9, SIZES, (20,) * 90 + (500,) * 10)
    made = Engine(net, method, task, method.phases(task)[0], Schedule(lr=1e-6, momentum=0.9), past)
    made.start_epoch(0)
    return made


def earlier(device: str) -> Batch:
    """A batch of the task before, for methods that measure something."""
    images, targets = torch.randn(64, 3, 32, 32, device=device), torch.randint(0, 90, (64,), device=device)
    return Batch(images, targets, Composition(64, 0, 8))


def step(made: Engine, device: str) -> Run:
    """A function that takes one step, again and again on the same rows."""
    batch = some_batch(device)
    return lambda: made.step(batch)


def reference(registry: Registry, backbone: str, norm: str, device: str) -> Run:
    """A step of FT and one forward pass of a teacher."""
    made, batch = engine(registry.methods["ft"].build(), registry, backbone, norm, device), some_batch(device)
    teacher = copy.deepcopy(made.net).eval().requires_grad_(False)

    def run() -> None:
        with torch.no_grad():
            teacher(batch.images)
        made.step(batch)

    return run


def herding(name: str, device: str) -> float:
    """The least seconds of five times, all ten classes together."""
    features: list[Tensor] = [torch.randn(500, 64, device=device) for _ in range(10)]

    def run() -> None:
        HERDINGS[name](features, 200)

    run()
    return min(seconds(run, device) for _ in range(5))


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a table of ratios and the seconds of herding."""
    registry = registries.load()
    parser = argparse.ArgumentParser(description="Methods in units of FT's step and one teacher forward.")
    parser.add_argument("--only", nargs="*", default=[], help="names of methods; all if left out")
    parser.add_argument("--pairs", type=int, default=11, help="of steps, for each method")
    parser.add_argument("--backbone", default="resnet32")
    parser.add_argument("--norm", default="bn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    place = torch.cuda.get_device_name() if given.device == "cuda" else f"CPU, {given.threads} thread(s)"
    print(f"torch {torch.__version__}, {place}, {given.backbone}, {given.norm}, {given.pairs} pairs, {COMPOSITION}\n")
    print("| method | step / (FT step + teacher forward) |\n| --- | --- |")
    where = (registry, given.backbone, given.norm, given.device)
    unit = reference(*where)
    for name in given.only or registry.methods:
        made = engine(registry.methods[name].build(), *where)
        print(f"| {name} | {time_ratio(step(made, given.device), unit, given.pairs, given.device):.2f} |", flush=True)
    found = ", ".join(f"{name} {herding(name, given.device):.3f} s" for name in HERDINGS)
    print(f"\nherding 200 of 500 in each of ten classes, 64 dimensions: {found}")


if __name__ == "__main__":
    main()
