"""How fast the norms are, and how much memory they take, in units of torch's BatchNorm2d.

    python -m benchmarks.norms                     every norm, on the CPU with one thread
    python -m benchmarks.norms --only tbbn --pairs 101
    python -m benchmarks.norms --device cuda

A ratio is the median over pairs of runs, forward and backward, of the norm and of BatchNorm2d right after one another,
so that whatever else the machine does hits both. The batch is 48 current and 16 past rows after nine tasks: 16 splits.
Memory is the peak of what a forward and backward pass allocates beyond its input and upstream gradient.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from cilnorm import registry
from cilnorm.batch import Composition
from cilnorm.norms import finish_norms, norm_factory
from cilnorm.testing.toys import tell

COMPOSITION = Composition(48, 16, 9)
SHAPES = [(64, 16, 32, 32), (64, 32, 16, 16), (64, 64, 8, 8), (64, 512, 7, 7)]
VARIANTS: dict[str, dict[str, Any]] = {"tbbn": {"splits": "exact"}, "frn": {"act": True}}
Run = Callable[[], None]


def step(
    layer: nn.Module,
    shape: Sequence[int],
    device: str,
    channels_last: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Run:
    """A function that runs the layer forward and backward once on the same values."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(*shape, device=device).to(dtype).contiguous(memory_format=layout).requires_grad_()
    g = torch.randn(*shape, device=device).to(dtype).contiguous(memory_format=layout)
    layer.to(device).train()
    tell(layer, COMPOSITION)

    def run() -> None:
        torch.autograd.grad(layer(x), [x, *layer.parameters()], g)

    return run


def seconds(run: Run, device: str) -> float:
    """One run, until the device is done; the CPU's time for a single thread, which no other process lengthens."""
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def time_ratio(run: Run, reference: Run, pairs: int, device: str) -> float:
    """Median over pairs of the first's time in units of the second's; which goes first alternates."""
    for _ in range(3):
        run()
        reference()
    ratios = []
    for pair in range(pairs):
        if pair % 2:
            one, other = seconds(run, device), seconds(reference, device)
        else:
            other, one = seconds(reference, device), seconds(run, device)
        ratios.append(one / other)
    return statistics.median(ratios)


@contextlib.contextmanager
def without_errors() -> Iterator[None]:
    """Inside, what libraries write to the error stream is lost; torch's profiler writes six lines a use."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peak_bytes(run: Run, device: str) -> int:
    """The most that is allocated at once during a run, beyond what was there before."""
    run()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    only_cpu = [torch.profiler.ProfilerActivity.CPU]
    with without_errors(), torch.profiler.profile(activities=only_cpu, profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    level = peak = 0
    for _, change in changes:
        level += change
        peak = max(peak, level)
    return peak


def cases(only: Sequence[str]) -> dict[str, Callable[[int], nn.Module]]:
    """Layers by label: every norm, and variants of some."""
    found: dict[str, Callable[[int], nn.Module]] = {}
    for name in only or registry.load().norms:
        found[name] = _builder(name, {})
        if name in VARIANTS:
            options = VARIANTS[name]
            label = ", ".join(f"{key}={value}" for key, value in options.items())
            found[f"{name} {label}"] = _builder(name, options)
    return found


def _builder(name: str, options: dict[str, Any]) -> Callable[[int], nn.Module]:
    factory = norm_factory(name, **options)
    return lambda channels: finish_norms(factory(channels), name)


def table(only: Sequence[str], pairs: int, device: str, channels_last: bool) -> str:
    """The whole table in Markdown: a row a norm, time for each shape and the largest memory ratio."""
    head = ["norm", *("x".join(map(str, shape)) for shape in SHAPES), "peak memory"]
    rows = []
    for label, build in cases(only).items():
        times, memory = [], []
        for shape in SHAPES:
            run = step(build(shape[1]), shape, device, channels_last)
            reference = step(nn.BatchNorm2d(shape[1]), shape, device, channels_last)
            times.append(time_ratio(run, reference, pairs, device))
            memory.append(peak_bytes(run, device) / peak_bytes(reference, device))
        rows.append([label, *(f"{ratio:.2f}" for ratio in times), f"{max(memory):.2f}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Norms in units of BatchNorm2d.")
    parser.add_argument("--only", nargs="*", default=[], help="names of norms; all if left out")
    parser.add_argument("--pairs", type=int, default=41, help="of runs, for each norm and shape")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--channels-last", action="store_true")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    place = torch.cuda.get_device_name() if given.device == "cuda" else f"CPU, {given.threads} thread(s)"
    print(f"torch {torch.__version__}, {place}, {given.pairs} pairs, {COMPOSITION}\n")
    print(table(given.only, given.pairs, given.device, given.channels_last))


if __name__ == "__main__":
    main()
