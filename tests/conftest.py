"""What many tests share: one thread, the installed plugins beside a tiny fake one, and a tiny spec."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from cilnorm.experiment import runner
from cilnorm.registry import Registry, load
from cilnorm.spec import Settings, Spec, resolve
from cilnorm.storage.figures import draw_figures
from tests import fake

# HYPOTHESIS_PROFILE=nightly pytest ... looks harder; what sets a number of examples of its own keeps it.
settings.register_profile("ci", max_examples=200, deadline=None)
settings.register_profile("nightly", max_examples=10_000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "method": "ft",
    "norm": "bn",
    "backbone": "tiny",
    "dataset": "blobs",
    "tasks": 3,
    "memory": 24,
    "rows": [12, 4],
    "augmentation": {"pad": 1, "crop": "random", "flip": True},
    "schedule": {"epochs": 2, "lr": 0.05, "momentum": 0.9, "milestones": [1]},
}


os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and tests send it


@pytest.fixture(autouse=True, scope="session")
def _loggers_keep_out_of_the_users_places(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where wandb, Trackio and MLflow put what they are told; they read it when they are imported."""
    place = tmp_path_factory.mktemp("loggers")
    os.environ |= {"WANDB_DIR": str(place), "WANDB_MODE": "offline", "TRACKIO_DIR": str(place / "trackio")}
    os.environ |= {"MLFLOW_TRACKING_URI": f"sqlite:///{place}/mlflow.db", "MLFLOW_DISABLE_TELEMETRY": "true"}


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _no_figures() -> Iterator[None]:
    """Drawing takes four fifths of a tiny run; who looks at figures asks for ``figures``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "draw_figures", lambda *_: None)
        yield


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of this process draw their figures."""
    monkeypatch.setattr(runner, "draw_figures", draw_figures)


@pytest.fixture(scope="session")
def registry() -> Registry:
    """Everything that is installed, and the fake plugin; nothing may be amiss."""
    return load(extra=[fake], strict=True)


@pytest.fixture
def tiny(registry: Registry) -> Callable[..., Spec]:
    """Makes a spec of three tasks of two classes, with values of one's own."""
    return lambda **asked: resolve("tiny", registry, Settings({"tiny": TINY}, {}), **asked)


@pytest.fixture
def finished(registry: Registry, tiny: Callable[..., Spec], tmp_path: Path) -> Any:
    """A finished run of the tiny spec."""
    return runner.run(tiny(), tmp_path / "run", device="cpu", registry=registry)
