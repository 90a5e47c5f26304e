"""PyCIL's iCaRL, WA and DER beside ours on the same few images of real CIFAR-100: accuracies and steps a second.

    python -m benchmarks.peers run theirs --checkout PyCIL --data DATA --method icarl --seed 0 >> FILE
    python -m benchmarks.peers run ours --data DATA --method icarl --seed 0 >> FILE
    python -m benchmarks.peers table FILE

Three tasks of ten classes, 50 training and 20 test images a class, 200 exemplars, shuffled batches of 32, 8 epochs for
the first task and 6 for each other, rate 0.02 (at 0.1 both are at chance that soon), a tenth of it later. The
seed draws weights and batches; 1993 + seed the order of classes, the same on both sides. PyCIL runs by its own
``main.py``, with these numbers in the place of its own; ours with ``--preset cifar100-pycil --protocol pycil``. Seconds
are CPU time of the process, one thread, from a batch to the end of the optimiser's step there, and from step to step
here.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import runpy
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torchvision.datasets import cifar

import cilnorm
from benchmarks.frameworks import TASKS, Record, prepare_pycil, write_few
from cilnorm import registry as registries
from cilnorm.images import ImageSet
from cilnorm.metrics import mean_text
from cilnorm.registry import Registry, Shelf
from cilnorm.results.comparison import Comparison, tested
from cilnorm.spec import resolve

EACH, TESTED, MEMORY, ROWS = 50, 20, 200, 32
FIRST, LATER, RATE = 8, 6, 0.02
SCORE = {"icarl": "nme", "wa": "cnn", "der": "cnn"}  # what fills our accuracy matrix
ORDER = 1993


def run_theirs(checkout: Path, data: Path, method: str, seed: int) -> dict[str, Any]:
    """PyCIL's accuracies in % over all classes so far, after each task, and seconds of a step of the last task."""
    sys.path.insert(0, str(checkout))
    record, trainer = Record(), importlib.import_module("trainer")
    numbers = {
        "init_epoch": FIRST, "epochs": LATER, "batch_size": ROWS, "init_lr": RATE, "lrate": RATE,
        "init_milestones": [2 * FIRST // 3], "milestones": [2 * LATER // 3],
    }  # fmt: skip
    settings = {"prefix": "beside", "memory_size": MEMORY, "seed": [ORDER + seed], "convnet_type": "resnet32"}
    trainer._set_random = lambda: torch.manual_seed(seed)  # theirs is 1 whatever the seed
    cifar.check_integrity = lambda path, md5=None: Path(path).is_file()  # for there are fewer images
    record.watch()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_few(data, Path("data/cifar-100-python"), EACH, TESTED)
        main_file = str(checkout / "main.py")
        sys.argv = [main_file, *prepare_pycil(record, method, numbers, settings, SCORE[method])]
        runpy.run_path(main_file, run_name="__main__")
        os.chdir(checkout)
    return {"accuracies": record.accuracies, "step": statistics.median(record.seconds[TASKS - 1])}


def few(registry: Registry) -> Registry:
    """The registry with the same few images of CIFAR-100 that ``write_few`` writes."""
    whole = registry.datasets["cifar100"]

    def build(root: Path | None) -> ImageSet:
        data, keep = whole.build(root), {}
        for part, each in (("train", EACH), ("test", TESTED)):
            images, labels = getattr(data, f"{part}_images"), getattr(data, f"{part}_labels")
            rows = torch.cat([(labels == label).nonzero()[:each, 0] for label in labels.unique()])
            keep |= {f"{part}_images": images[rows], f"{part}_labels": labels[rows]}
        return replace(data, **keep)

    shelf = Shelf("dataset", {**registry.datasets, "cifar100": replace(whole, build=build)})
    return replace(registry, datasets=shelf)


def run_ours(data: Path, method: str, seed: int) -> dict[str, Any]:
    """The same of ours."""
    spent: list[float] = []
    last = 0, 0.0

    def watch(event: dict[str, Any]) -> None:
        nonlocal last
        if event["event"] == "task":
            spent.clear()
        elif event["event"] == "step":
            now = time.process_time()
            if event["step"] == last[0] + 1:
                spent.append(now - last[1])
            last = event["step"], now

    registry = few(registries.load())
    spec = resolve(
        "cifar100-pycil", registry,
        method=method, norm="bn", seed=seed, class_order=ORDER + seed, memory=MEMORY, rows=[ROWS - 8, 8],
        protocol="pycil", stop_after=TASKS, precision="fp32",
        **{
            "schedule.lr": RATE, "schedule.epochs": LATER, "schedule.milestones": [2 * LATER // 3],
            "schedule.first_epochs": FIRST, "schedule.first_milestones": [2 * FIRST // 3],
        },
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        result = cilnorm.run(
            spec, Path(folder, "run"), device="cpu", data_root=data, registry=registry, watch=[watch]
        )  # fmt: skip
    rows = [row[: task + 1] for task, row in enumerate(result.matrix[:TASKS])]
    return {"accuracies": [statistics.mean(row) for row in rows], "step": statistics.median(spent)}


def table(path: Path) -> list[list[str]]:
    """Means and standard deviations over the seeds that both sides have, and ours less theirs by seed."""
    found: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("{"):
            each = json.loads(line)
            found.setdefault(each["method"], {"ours": {}, "theirs": {}})[each["side"]][each["seed"]] = each
    rows = [["", *(f"after task {task + 1}" for task in range(TASKS)), "step (s)", "seeds"]]
    for method, sides in sorted(found.items()):
        seeds = tuple(sorted(sides["ours"].keys() & sides["theirs"].keys()))
        ours, theirs = ([side[seed] for seed in seeds] for side in (sides["ours"], sides["theirs"]))
        pairs = [tested("", _after(theirs, task), _after(ours, task), seeds, True) for task in range(TASKS)]
        for name, runs in ((method, ours), (f"PyCIL {method}", theirs)):
            means = [mean_text(_after(runs, task)) for task in range(TASKS)]
            step = statistics.median(run["step"] for run in runs)
            rows.append([name, *means, f"{step:.3f}", ", ".join(map(str, seeds))])
        ratio = statistics.median(one["step"] / other["step"] for one, other in zip(ours, theirs, strict=True))
        rows.append(["ours less theirs", *map(apart, pairs), f"ratio {ratio:.2f}", ""])
    return rows


def _after(runs: Sequence[dict[str, Any]], task: int) -> tuple[float, ...]:
    return tuple(run["accuracies"][task] for run in runs)


def apart(pair: Comparison) -> str:
    """The mean difference with its 95 % interval, where there is one."""
    return f"{pair.difference:+.2f}" + ("" if pair.low is None else f" ({pair.low:+.2f} to {pair.high:+.2f})")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one side, or prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run")
    one.add_argument("side", choices=["theirs", "ours"])
    one.add_argument("--checkout", type=Path, default=Path())
    one.add_argument("--data", type=Path, required=True)
    one.add_argument("--method", choices=list(SCORE), required=True)
    one.add_argument("--seed", type=int, default=0)
    commands.add_parser("table").add_argument("file", type=Path)
    asked = parser.parse_args(argv)
    if asked.command == "table":
        print("\n".join("\t".join(row) for row in table(asked.file)))
        return
    data, checkout = asked.data.resolve(), asked.checkout.resolve()
    torch.set_num_threads(1)
    if asked.side == "theirs":
        found = run_theirs(checkout, data, asked.method, asked.seed)
    else:
        found = run_ours(data, asked.method, asked.seed)
    print(json.dumps({"side": asked.side, "method": asked.method, "seed": asked.seed, **found}))


if __name__ == "__main__":
    main()
