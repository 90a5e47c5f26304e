"""What a checkpoint costs: its bytes, and its time as a part of an epoch, at the settings of a CIFAR-100 run.

    python -m benchmarks.checkpoints

A run of LUCIR with TBBN on ResNet-32 learns two tasks from a few random images, in epochs of some steps, and writes its
checkpoints as any run does. Steps and checkpoints of the second task are timed, where there are a teacher and momenta;
the epoch that a checkpoint is compared with has as many steps as 5,000 images make.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import random_images
from cilnorm import registry as registries
from cilnorm.experiment.runner import run
from cilnorm.spec import Spec, resolve
from cilnorm.storage.checkpoint import Checkpoints

STEPS = 5000 // 48 + 1  # of an epoch


class Stopwatch:
    """Takes the time of every step and every checkpoint of a run's last task."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.writes: list[float] = []
        self.bytes = 0
        self._before = (0, 0.0)

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "task":
            self.steps, self.writes = [], []
        if event["event"] == "step":
            if event["step"] == self._before[0] + 1:
                self.steps.append(time.perf_counter() - self._before[1])
            self._before = event["step"], time.perf_counter()

    def timed(self, checkpoints: Checkpoints, *arguments: Any) -> None:
        """Writes a checkpoint, on time."""
        start = time.perf_counter()
        WRITE(checkpoints, *arguments)
        self.writes.append(time.perf_counter() - start)
        self.bytes = checkpoints.last.stat().st_size


WRITE = Checkpoints.write


def measured(spec: Spec) -> tuple[float, float, int]:
    """Median seconds of a step and of a checkpoint, and the checkpoint's bytes."""
    watch = Stopwatch()
    Checkpoints.write = lambda self, *arguments: watch.timed(self, *arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            run(
                spec, Path(folder) / "run", device="cpu", registry=registries.load(extra=[random_images]), watch=[watch]
            )
    finally:
        Checkpoints.write = WRITE
    return statistics.median(watch.steps), statistics.median(watch.writes), watch.bytes


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the cost."""
    parser = argparse.ArgumentParser(description="What a checkpoint costs.")
    parser.add_argument("--epochs", type=int, default=6, help="of each of the two tasks; a checkpoint each")
    parser.add_argument("--backbone", default="resnet32")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    asked: dict[str, Any] = {"dataset": "random-images", "dataset.train": 20, "dataset.test": 1, "stop_after": 2}
    asked |= {"method": "lucir", "norm": "tbbn", "backbone": given.backbone, "epochs": given.epochs}
    step, write, size = measured(resolve("cifar100-momentum", registries.load(extra=[random_images]), **asked))
    print(f"step {step:.3f} s, epoch of {STEPS} steps {step * STEPS:.1f} s; checkpoint {write:.3f} s, {size:,} bytes")
    print(f"a checkpoint takes {100 * write / (step * STEPS):.2f} % of an epoch")


if __name__ == "__main__":
    main()
