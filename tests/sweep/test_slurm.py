"""Jobs of a cluster, with submitit's local processes in its place."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cilnorm.experiment.runner import run
from cilnorm.registry import Registry
from cilnorm.spec import Spec, SpecError
from cilnorm.sweep import slurm
from cilnorm.sweep.jobs import Job
from tests.conftest import ROOT
from tests.strangers import distribute

pytestmark = pytest.mark.slow

pytest.importorskip("submitit")


@pytest.fixture
def job(tiny: Callable[..., Spec], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    distribute(tmp_path / "site", "fake", {}, {"fake": "tests.fake"})
    before = [str(tmp_path / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(before))
    made = Job("ft x bn", tiny(epochs=20), tmp_path / "cells" / "one")
    made.prepare(registry)
    return made


def family(process: int) -> list[int]:
    """A process, and all that it started."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [process, *(member for child in children for member in family(int(child)))]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's list of processes")
def test_a_killed_job_is_resumed_by_the_next_submission(job: Job, registry: Registry, tmp_path: Path) -> None:
    on = slurm.executor(tmp_path / "jobs", "local", {})
    handle: Any = slurm.submit([job], ["--device", "cpu"], on)[job]
    until = time.monotonic() + 150
    while not (job.folder / "checkpoints" / "last.pt").exists():
        assert time.monotonic() < until, job.log.read_text()
        time.sleep(0.02)
    for process in family(handle._process.pid):  # as a cluster does
        os.kill(process, signal.SIGKILL)
    handle._process.wait()
    assert job.state == "interrupted"
    again = slurm.submit([job], ["--device", "cpu"], slurm.executor(tmp_path / "jobs", "local", {}))[job]
    assert again.result() == 0, job.log.read_text()
    assert job.state == "finished"
    whole = run(job.spec, tmp_path / "whole", device="cpu", registry=registry)
    assert (job.folder / "accuracy.csv").read_text() == (whole.folder / "accuracy.csv").read_text()


def test_what_is_queued_is_not_submitted_twice(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    class Handle:
        job_id = "17"

        def __init__(self, folder: object = None, number: str = "17") -> None:
            self.state = states[number]

    class Cluster:
        folder, cluster = None, "slurm"

        def submit(self, asked: slurm.Submission) -> Handle:
            submitted.append(asked)
            return Handle()

    monkeypatch.setattr("submitit.SlurmJob", Handle)
    states, submitted = {"17": "PENDING"}, []
    for state, expected in (("PENDING", 1), ("RUNNING", 1), ("FAILED", 2), ("TIMEOUT", 3)):
        states["17"] = state
        slurm.submit([job], ["--device", "cpu"], Cluster())
        assert len(submitted) == expected
    assert submitted[0].job.folder.is_absolute()
    assert submitted[0].checkpoint().function is submitted[0]


def test_what_submitit_refuses_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecError, match=r"^submitit: "):
        slurm.executor(tmp_path, "local", {"partitoin": "gpu"})
    monkeypatch.setattr(slurm, "find_spec", lambda name: None)
    with pytest.raises(SpecError, match=r"pip install 'cilnorm\[slurm\]'"):
        slurm.executor(tmp_path, "slurm", {})


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_a_job_that_is_taken_back_lets_its_run_save(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """submitit ends the process that waits for the run by SystemExit, out of a signal's handler."""
    saves = "import signal, sys; signal.signal(signal.SIGINT, lambda *_: (print('saved'), sys.exit(0))); print('here')"
    ours = [sys.executable, "-u", "-c", f"{saves}; signal.pause()"]
    monkeypatch.setattr(slurm, "command", lambda *_: ours)
    before = signal.signal(signal.SIGUSR2, lambda *_: sys.exit(-1))

    def take_back() -> None:
        while not (job.log.exists() and "here" in job.log.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGUSR2)

    threading.Thread(target=take_back, daemon=True).start()
    try:
        with pytest.raises(SystemExit):
            slurm.Submission(job, [])()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert job.log.read_text().split() == ["here", "saved"]
