"""The benchmarks of steps run, from the command line, since they start processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from benchmarks import cpu_step, gpu
from cilnorm.training.engine import Engine
from cilnorm.training.fast_engines import CaptureRefused
from tests.conftest import ROOT

pytestmark = pytest.mark.slow


def printed(*command: str) -> tuple[str, Any]:
    """All that a benchmark printed, and what its last line says."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout, json.loads(done.stdout.strip().splitlines()[-1])


def test_gpu_at_toy_size() -> None:
    text, found = printed("benchmarks.gpu", "--dry")
    assert "failed" not in text
    assert set(found["steps"]) == {f"lucir {norm} eager {p}" for norm in ("bn", "tbbn") for p in ("fp32", "bf16")}
    assert found["ratios"]["tbbn / bn: lucir tbbn eager fp32"] > 0
    assert found["ten tasks, ft tbbn"]["step of task 10 / task 2"] > 0
    assert found["throughput, steps/s"]["2"] > 0


def test_a_refused_capture_is_a_failure_and_no_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Refusing(Engine):
        """Eager, after saying that it should not be."""

        def epoch(self, *arguments: Any) -> Iterator[None]:
            warnings.warn("this step can't be captured (no GPU); going on eagerly", CaptureRefused, stacklevel=1)
            return super().epoch(*arguments)

    made = gpu.engine_class
    monkeypatch.setattr(gpu, "engine_class", lambda name, device: Refusing if name == "graph" else made(name, device))
    monkeypatch.setattr("cilnorm.experiment.runner.engine_class", lambda name, device: Refusing)
    size = replace(gpu.DRY, engines=("eager", "graph"), precisions=("fp32",), workers=())
    monkeypatch.setattr(gpu, "DRY", size)
    with pytest.raises(SystemExit, match=r"failed: ten tasks, ft tbbn, lucir bn graph fp32, lucir tbbn graph fp32"):
        gpu.main(["--dry"])
    text = capsys.readouterr().out
    found = json.loads(text.strip().splitlines()[-1])
    assert "FAILED: RuntimeError: this step can't be captured (no GPU)" in text
    assert "steps/s" not in found["steps"]["lucir bn graph fp32"]
    assert found["steps"]["lucir bn eager fp32"]["steps/s"] > 0
    assert not [label for label in found["ratios"] if "graph" in label]


def test_cpu_step() -> None:
    asked = ["plain", "ft+bn", "ft+tbbn", "ft+bn compiled"]
    text, found = printed("benchmarks.cpu_step", "--rounds", "2", "--backbone", "resnet8", "--only", *asked)
    ratios = {"plain / ft+bn", "ft+tbbn / ft+bn", "plain / ft+bn compiled"}
    assert {line.split(":")[0] for line in text.splitlines()[:-1]} == {*asked, *ratios}
    assert set(found) == {"rounds", "backbone", *ratios}
    assert all(0 < found[each]["low"] <= found[each]["median"] <= found[each]["high"] for each in ratios)


def test_a_cpu_step_in_bf16() -> None:  # slow where the processor has no instructions for it, so one step
    make, norm, engine, precision = cpu_step.CONTESTANTS["ft+tbbn bf16"]
    assert precision == "bf16"
    make(None, norm, "resnet8", engine, precision)()
