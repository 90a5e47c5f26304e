"""Streams of randomness are independent of one another, of the process and of threads; the rest is recorded."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.chaos import results
from cilnorm.batch import Task
from cilnorm.experiment.runner import run
from cilnorm.registry import Registry
from cilnorm.spec import Spec
from cilnorm.training.randomness import generator
from tests.experiment.test_runner import CPU, Event

pytestmark = pytest.mark.slow

BATCHES = """
import sys, torch, hashlib
from cilnorm.training.pixels import Augmentation, Pixels
from cilnorm.training.randomness import generator
torch.set_num_threads(int(sys.argv[1]))
images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=generator(0, "images"))
pixels = Pixels(images, (0.5,) * 3, (0.3,) * 3, Augmentation(4, "resized", True, 0.2))
views = pixels.draw(64, generator(0, "augmentation", 1, 2, 3))
batch = pixels.augmented(torch.arange(64), views)
print(hashlib.sha256(batch.contiguous().numpy().tobytes()).hexdigest())
"""


def test_one_more_consumer_of_randomness_moves_no_other(
    tiny: Callable[..., Spec], registry: Registry, tmp_path: Path
) -> None:
    spec = tiny(method="two-phases", norm="tbbn", tasks=2)

    def consume(event: Event) -> None:
        torch.rand(3)
        random.random()
        np.random.rand(3)
        generator(spec.seed, "a new stream", event.get("task", 0)).manual_seed(1)

    run(spec, tmp_path / "one", registry=registry, **CPU)
    run(spec, tmp_path / "other", registry=registry, watch=[consume], **CPU)
    assert results(tmp_path / "one") == results(tmp_path / "other")


def test_batches_are_the_same_in_every_process_with_any_number_of_threads() -> None:
    asked = [subprocess.run([sys.executable, "-c", BATCHES, str(threads)], capture_output=True, check=True)
             for threads in (1, 3)]  # fmt: skip
    assert len({done.stdout for done in asked}) == 1
    assert len(asked[0].stdout) == 65


def test_what_could_differ_is_recorded(tiny: Callable[..., Spec], registry: Registry, tmp_path: Path) -> None:
    run(tiny(tasks=1, epochs=1), tmp_path, registry=registry, **CPU)
    found = json.loads((tmp_path / "environment.json").read_text())
    assert found["threads"] == torch.get_num_threads()
    assert found["deterministic"] is False
    assert found["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert found["blas"]
    assert {"interop_threads", "cudnn", "tf32", "variables", "device_name", "onednn"} <= found.keys()
    assert len(found["images"]["classes"]) == 6
    assert found["images"]["size"] == [3, 8, 8]


def test_deterministic_sets_all_switches() -> None:
    code = (
        "import os, torch; from cilnorm.storage.environment import be_deterministic; be_deterministic();"
        "print(torch.are_deterministic_algorithms_enabled(), os.environ['CUBLAS_WORKSPACE_CONFIG'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", ":4096:8"]


def test_gradient_noise_depends_on_the_step_alone(registry: Registry) -> None:
    """An engine that starts within an epoch draws what one draws that has come there."""
    from cilnorm.heads import Linear
    from cilnorm.method import Phase, Schedule
    from cilnorm.network import Network
    from cilnorm.training.engine import Engine
    from tests.fake import Tiny, TwoPhases

    noises = []
    for steps in (0, 2):
        net = Network(Tiny(torch.nn.BatchNorm2d), Linear(Tiny.dim))
        net.head.grow(2)
        engine = Engine(net, TwoPhases(), Task(0, (2,)), Phase(gradient_noise=1.0), Schedule(), None)
        engine.start_epoch(1, steps)
        for _ in range(3 - steps):
            for parameter in engine.parameters:
                parameter.grad = torch.zeros_like(parameter)
            engine.draw_noise()
            engine._add_noise()
        noises.append(engine.parameters[0].grad)
    assert noises[0] is not None
    assert noises[1] is not None
    assert torch.equal(noises[0], noises[1])
    assert noises[0].any()
