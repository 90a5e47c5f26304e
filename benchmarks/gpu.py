"""All that a visit to a GPU should measure, in one command of less than eight minutes.

    python -m benchmarks.gpu                          random images in the size of CIFAR-100
    python -m benchmarks.gpu --data-root DATA --full  real ones, and a whole ten-task run besides
    python -m benchmarks.gpu --dry                    the same at toy size on the CPU, to see that it works

Prints steps a second for methods, norms, engines and precisions in the tenth task, TBBN in units of batch norm, the
time of a ten-task run of FT and TBBN at 160 epochs (from a run of a few epochs a task, checkpoints and evaluation
included; with ``--full`` the real thing), a step of task 10 in units of one of task 2, the throughput of several
processes on the one GPU, and peak memory. What fails is named in its place and stops nothing else, and so is a step
whose capture is refused, for its time would be that of the eager engine. Ends with a line of JSON, and with status 1
where anything failed.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch

from benchmarks import random_images
from cilnorm import registry as registries
from cilnorm.batch import Composition
from cilnorm.experiment.assembly import assemble
from cilnorm.experiment.runner import run
from cilnorm.method import Phase
from cilnorm.spec import Spec, resolve
from cilnorm.training.batches import EpochBatches, draw_batches
from cilnorm.training.engine import Engine
from cilnorm.training.epoch_plan import RowSource, plan_epoch
from cilnorm.training.fast_engines import CaptureRefused, engine_class
from cilnorm.training.precision import matmul_precision
from cilnorm.training.randomness import generator

EPOCHS = 160  # of the paper's protocol, for the extrapolation


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    device: str = "cuda"
    root: Path | None = None
    backbone: str = "resnet32"
    images: dict[str, int] = field(default_factory=dict)
    methods: tuple[str, ...] = ("ft", "lucir", "podnet")
    engines: tuple[str, ...] = ("eager", "graph")
    precisions: tuple[str, ...] = ("tf32", "bf16")
    epochs: int = 3  # of each cell's timing, and of each task of the short run
    most_steps: int = 105  # of a cell's epoch
    workers: tuple[int, ...] = (1, 2, 4, 8)
    seconds: float = 5.0  # of each throughput


DRY = Size(
    "cpu", None, "resnet8", {"train": 20, "test": 2, "size": 8, "classes": 20}, ("lucir",), ("eager",),
    ("fp32", "bf16"), epochs=2, most_steps=2, workers=(2,), seconds=0.2,
)  # fmt: skip


def specified(size: Size, method: str, norm: str, **asked: Any) -> tuple[Spec, Any]:
    """The CIFAR-100 preset for a cell, on real or random images."""
    registry = registries.load(extra=[random_images])
    data = {"dataset": "cifar100"} if size.root else {"dataset": "random-images", **size.images}
    data = {key if key in ("dataset", "classes") else f"dataset.{key}": value for key, value in data.items()}
    if "classes" in data:
        data["dataset.classes"] = data.pop("classes")
    return resolve("cifar100", registry, method=method, norm=norm, backbone=size.backbone, **data, **asked), registry


@dataclass(frozen=True, eq=False)
class Cell:
    """A method and a norm in the tenth task: the untrained network, its teacher, and epochs to train on."""

    spec: Spec
    parts: Any
    past: Any
    memory: torch.Tensor

    def engine(self, name: str, precision: str) -> Engine:
        """An engine on a copy of the network."""
        net, task = copy.deepcopy(self.parts.net), self.parts.stream.tasks[-1]
        made = engine_class(name, self.parts.device)  # type: ignore[arg-type]
        method, schedule = self.parts.method, self.spec.schedule
        return made(net, method, task, Phase(), schedule, self.past, 0, precision)  # type: ignore[arg-type]

    def epoch(self, number: int, most_steps: int) -> EpochBatches:
        """An epoch as the runner lays it out, cut to so many steps."""
        task, (current, past) = self.parts.stream.tasks[-1], self.spec.rows
        sources = [RowSource(self.parts.stream.train(task), current, "current"), RowSource(self.memory, past, "past")]
        plan = plan_epoch(sources, Composition(current, past, task.index), self.spec.protocol, 0, (9, 0), number)
        plan = replace(plan, indices=plan.indices[:most_steps], draws=plan.draws[:most_steps])
        return draw_batches(plan, self.parts.train, self.parts.stream.targets, generator(0, "views", number))


def cell(size: Size, method: str, norm: str) -> Cell:
    """The cell on the device."""
    spec, registry = specified(size, method, norm)
    parts = assemble(spec, registry, torch.device(size.device), size.root)
    *earlier, last = parts.stream.tasks
    for task in earlier:
        parts.net.grow(task.new)
    parts.net.to(parts.device)
    before = Composition(sum(spec.rows), 0, earlier[-1].index)
    indices = parts.stream.train(earlier[-1])[: before.rows]
    plan = plan_epoch(
        [RowSource(indices, len(indices), "seen")], replace(before, current=len(indices)), spec.protocol, 0, (8, 0), 0
    )
    seen = draw_batches(plan, parts.train, parts.stream.targets, generator(0, "views"))
    past = parts.method.remember(parts.net, earlier[-1], lambda: seen)
    parts.net.grow(last.new)
    parts.net.to(parts.device)
    memory = torch.cat([rows[:20] for task in earlier for rows in parts.stream.by_class(task)])
    return Cell(spec, parts, past, memory)


def wait(device: str) -> None:
    """Until the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(size: Size, made: Engine, of: Cell) -> dict[str, Any]:
    """Steps a second (the fastest epoch, feed included), mean terms of the last epoch, peak memory in MiB."""
    seconds, terms = [], {}
    if size.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with failing_where_refused():
        for number in range(size.epochs + 1):  # the first one warms up, or captures
            wait(size.device)
            start = time.perf_counter()
            made.start_epoch(number)
            each = of.epoch(number, size.most_steps)
            for _ in made.epoch(each):
                pass
            terms = made.finish_epoch()
            seconds.append((time.perf_counter() - start) / len(each))
    peak = torch.cuda.max_memory_allocated() / 2**20 if size.device == "cuda" else 0.0
    return {"steps/s": round(1 / min(seconds[1:]), 1), "peak MiB": round(peak), "terms": terms}


@contextmanager
def failing_where_refused() -> Iterator[None]:
    """Times of a step that was to be captured and was not are those of another engine.

    Raises:
        RuntimeError: a capture was refused inside.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield
    for each in said:
        if issubclass(each.category, CaptureRefused):
            raise RuntimeError(str(each.message))
        warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


def steps_table(size: Size) -> dict[str, Any]:
    """Every cell, engine and precision."""
    found: dict[str, Any] = {}
    for method in size.methods:
        for norm in ("bn", "tbbn"):
            with failing(found, f"{method} {norm}"):
                here = cell(size, method, norm)
                for precision in size.precisions:
                    for name in size.engines:
                        label = f"{method} {norm} {name} {precision}"
                        with failing(found, label), matmul_precision(precision):  # type: ignore[arg-type]
                            found[label] = timed(size, here.engine(name, precision), here)
                        print(f"  {label:28} {told(found[label])}", flush=True)
    return found


def has_failed(result: Any) -> bool:
    """Whether an entry is what ``failing`` makes."""
    return isinstance(result, dict) and "failed" in result


def told(result: dict[str, Any]) -> str:
    """A cell in words."""
    if has_failed(result):
        return f"FAILED: {result['failed']}"
    return f"{result['steps/s']:9.1f} steps/s {result['peak MiB']:6} MiB"


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """Seconds of a step of TBBN in units of batch norm's, and of the eager engine in units of the graph's."""
    rates = {label: result["steps/s"] for label, result in found.items() if "steps/s" in result}
    balanced = {label: label.replace(" tbbn ", " bn ") for label in rates if " tbbn " in label}
    made = {f"tbbn / bn: {label}": rates[other] / rates[label] for label, other in balanced.items() if other in rates}
    eager = {label: label.replace(" graph ", " eager ") for label in rates if " graph " in label}
    made |= {
        f"graph over eager: {label}": rates[label] / rates[other] for label, other in eager.items() if other in rates
    }
    return {label: round(ratio, 3) for label, ratio in made.items()}


def disagreement(found: dict[str, Any]) -> dict[str, float]:
    """By how much, relatively, the graph's loss terms differ from the eager engine's in the last epoch, at most."""
    made = {}
    for label, result in found.items():
        other = found.get(label.replace(" graph ", " eager "), {})
        if " graph " in label and "terms" in result and "terms" in other:
            pairs = [(result["terms"][name], value) for name, value in other["terms"].items()]
            made[label] = max(abs(a - b) / max(abs(b), 1e-12) for a, b in pairs)
    return made


def ten_tasks(size: Size, epochs: int, engine: str = "auto") -> dict[str, Any]:
    """A whole run of FT and TBBN by the runner: seconds, and those of an epoch and of a step in each task."""
    spec, registry = specified(size, "ft", "tbbn", **{"schedule.epochs": epochs, "engine": engine})
    events: list[dict[str, Any]] = []
    keep = ("run", "task", "epoch", "accuracy", "finished")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        watch = [lambda event: events.append(event) if event["event"] in keep else None]
        try:
            with failing_where_refused():
                run(spec, Path(folder) / "run", device=size.device, data_root=size.root, registry=registry, watch=watch)
        except ImportError:  # figures alone need matplotlib, and they come last
            if sum(event["event"] == "accuracy" for event in events) < spec.tasks:
                raise
    total = time.perf_counter() - start
    step, epoch = {}, {}
    for task in range(1, spec.tasks + 1):
        times = [event["seconds"] for event in events if event["event"] == "epoch" and event["task"] == task]
        steps = next(event["steps"] for event in events if event["event"] == "epoch" and event["task"] == task)
        epoch[task] = statistics.median(b - a for a, b in itertools.pairwise(times))
        step[task] = epoch[task] / steps
    return {
        "epochs": epochs,
        "seconds": round(total, 2),
        f"seconds at {EPOCHS} epochs": round(total + sum(epoch.values()) * (EPOCHS - epochs), 1),
        "ms a step, task 1, 2, 10": [round(1000 * step[task], 4) for task in (1, 2, 10)],
        "step of task 10 / task 2": round(step[10] / step[2], 3),
    }


def work(size: Size, norm: str, together: Barrier, results: Any) -> None:
    """One of several processes: steps for some seconds, all at once; answers with steps a second."""
    torch.set_num_threads(1)
    with matmul_precision("tf32"), failing_where_refused():
        here = cell(size, "ft", norm)
        made = here.engine("auto", "tf32" if size.device == "cuda" else "fp32")
        made.start_epoch(0)
        feeds = [here.epoch(number, size.most_steps) for number in range(2)]
        for _ in made.epoch(feeds[0]):
            pass
        made.finish_epoch()
        together.wait(120)
        start, steps = time.perf_counter(), 0
        while time.perf_counter() - start < size.seconds:
            made.start_epoch(0)
            steps += sum(1 for _ in made.epoch(feeds[1]))
            made.finish_epoch()
        results.put(steps / (time.perf_counter() - start))


def throughput(size: Size, count: int) -> float:
    """Steps a second of so many processes together.

    Raises:
        RuntimeError: one of them died.
    """
    context = multiprocessing.get_context("spawn")
    together, results = context.Barrier(count), context.Queue()
    workers = [context.Process(target=work, args=(size, "tbbn", together, results), daemon=True) for _ in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(150)
    if any(worker.exitcode for worker in workers) or any(worker.is_alive() for worker in workers):
        for worker in workers:
            worker.terminate()
        raise RuntimeError(f"exit codes {[worker.exitcode for worker in workers]}")
    return float(sum(results.get(timeout=10) for _ in workers))


@contextmanager
def failing(found: dict[str, Any], label: str) -> Iterator[None]:
    """What goes wrong inside becomes an entry."""
    try:
        yield
    except Exception as error:
        found[label] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints, and ends with JSON."""
    parser = argparse.ArgumentParser(description="What a visit to a GPU should measure.")
    parser.add_argument("--dry", action="store_true", help="toy size on the CPU")
    parser.add_argument("--full", action="store_true", help=f"a whole run of {EPOCHS} epochs a task besides")
    parser.add_argument("--data-root", type=Path, help="folder of CIFAR-100; random images if left out")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="of the steps; ft lucir podnet if left out")
    parser.add_argument("--workers", nargs="*", type=int, metavar="N", help="of the throughput; 1 2 4 8 if left out")
    given = parser.parse_args(argv)
    size = replace(DRY if given.dry else Size(), root=given.data_root)
    if given.methods:
        size = replace(size, methods=tuple(given.methods))
    if given.workers is not None:
        size = replace(size, workers=tuple(given.workers))
    if size.root:
        size = replace(size, images={})
    if size.device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: no CUDA device here; --dry runs on the CPU")
    report: dict[str, Any] = {"torch": torch.__version__, "python": sys.version.split()[0], "dry": given.dry}
    report["device"] = torch.cuda.get_device_name() if size.device == "cuda" else "cpu"
    began = time.perf_counter()

    def section(title: str, measure: Callable[[], Any]) -> None:
        print(f"\n{title}", flush=True)
        with failing(report, title):
            report[title] = measure()
        shown = report[title]
        if title != "steps":
            print("\n".join(f"  {key}: {value}" for key, value in shown.items()), flush=True)
        print(f"  [{time.perf_counter() - began:.0f} s]", flush=True)

    print(f"torch {report['torch']}, python {report['python']}, {report['device']}, {size.backbone}, task 10")
    section("steps", lambda: steps_table(size))
    section("ratios", lambda: ratios(report["steps"]))
    section("graph against eager, terms", lambda: disagreement(report["steps"]))
    section("ten tasks, ft tbbn", lambda: ten_tasks(size, size.epochs))
    section("throughput, steps/s", lambda: {count: round(throughput(size, count), 1) for count in size.workers})
    if given.full:
        section("full run, ft tbbn", lambda: ten_tasks(size, EPOCHS if not given.dry else size.epochs))
    print(json.dumps(report))
    failures = [label for part in (report, report["steps"]) for label, each in part.items() if has_failed(each)]
    if failures:
        sys.exit(f"benchmarks.gpu: failed: {', '.join(failures)}")


if __name__ == "__main__":
    main()
