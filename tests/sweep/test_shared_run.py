"""One run as a job of several tasks, with submitit's local processes in the place of a cluster's."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cilnorm.cli.app import app
from cilnorm.experiment.runner import run
from cilnorm.registry import Registry
from cilnorm.spec import Spec
from cilnorm.sweep.shared_run import Share, SharedJob, SharedSubmission, submit_shared
from tests.conftest import ROOT
from tests.strangers import distribute

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

pytest.importorskip("submitit")
cloudpickle = pytest.importorskip("cloudpickle")
TWO = Share(settings={"tasks_per_node": 2, "timeout_min": 4}, cluster="local")


@pytest.fixture
def job(tiny: Callable[..., Spec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SharedJob:
    distribute(tmp_path / "site", "fake", {}, {"fake": "tests.fake"})
    before = [str(tmp_path / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(before))
    return SharedJob("run", tiny(norm="tbbn", epochs=4), tmp_path / "run")


def until(found: Callable[[], Any], job: SharedJob) -> Any:
    """What ``found`` returns once that is true."""
    last = time.monotonic() + 120
    while not (value := found()):
        assert time.monotonic() < last, job.log.read_text()
        time.sleep(0.02)
    return value


def process_of(job: SharedJob, rank: int) -> int:
    """That of the run itself, which a task of the job has started."""
    for one in Path("/proc").glob("[0-9]*"):
        try:
            words, names = ((one / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
        except OSError:  # it has ended
            continue
        if str(job.folder).encode() in words and f"RANK={rank}".encode() in names:
            return int(one.name)
    raise ProcessLookupError(f"rank {rank}")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's list of processes")
def test_a_job_of_two_tasks_of_which_one_was_killed_goes_on(job: SharedJob, registry: Registry, tmp_path: Path) -> None:
    first: Any = submit_shared(job, TWO, ["--device", "cpu"], registry)
    until((job.folder / "checkpoints" / "last.pt").exists, job)
    os.kill(process_of(job, 1), signal.SIGKILL)
    until(first.done, job)
    assert job.state == "failed"
    assert first.results() == [1, -signal.SIGKILL]
    assert "another process of the run ended" in job.log.read_text()
    again: Any = submit_shared(job, TWO, ["--device", "cpu"], registry)
    until(again.done, job)
    assert again.results() == [0, 0], job.log.read_text()
    assert job.state == "finished"
    whole = run(job.spec, tmp_path / "whole", device="cpu", registry=registry)
    assert (job.folder / "accuracy.csv").read_text() == (whole.folder / "accuracy.csv").read_text()
    assert '"processes": 2' in (job.folder / "environment.json").read_text()


# What a cluster is asked for.


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of commands that answer as SLURM's do: a job is pending, and what was submitted lies in ``asked``."""
    commands = {
        "srun": "exit 1",
        "sbatch": f'cat "$1" > {tmp_path}/asked; echo "Submitted batch job 17"',
        "sacct": 'echo "JobID|State|NodeList"; echo "17|PENDING|"',
    }
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cilnorm(*words: str) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["run", "--launcher", "slurm", "--out", "run", *words])


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
def test_the_command_submits_one_job_whose_tasks_share_the_run(cluster: Path) -> None:
    where = ("--nodes", "2", "--gpus-per-node", "8", "--cluster", "slurm_partition=gpu")
    told = cilnorm(*where, "--logger", "csv", "--device", "cuda")
    assert told.exit_code == 0, told.output
    assert "job 17 submitted: 8 processes on each of 2 machines" in told.stdout
    asked = (cluster / "asked").read_text().splitlines()
    for line in ("nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "partition=gpu"):
        assert f"#SBATCH --{line}" in asked
    [pickled] = (cluster / "run.submitit").glob("17*submitted.pkl")
    submission = cloudpickle.loads(pickled.read_bytes()).function
    assert isinstance(submission, SharedSubmission)
    assert submission.flags == ["--device", "cuda", "--logger=csv"]
    out = str(cluster / "run")
    assert submission.job.arguments() == ["run", "--spec", f"{out}.yaml", "--out", out, "--resume"]
    (cluster / "asked").unlink()
    again = cilnorm(*where, "--resume")
    assert "in the queue or at work, 0 % done: run" in again.stdout
    assert not (cluster / "asked").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
def test_a_dry_run_says_what_would_be_submitted(cluster: Path) -> None:
    told = cilnorm("--nodes", "2", "--gpus-per-node", "8", "--device", "cpu", "--dry-run")
    assert told.exit_code == 0, told.output
    job, *spec = told.stdout.splitlines()
    assert job == "# one job of 8 processes on each of 2 machines: nodes=2, tasks_per_node=8, gpus_per_node=8"
    assert yaml.safe_load("\n".join(spec))["preset"] == "quick"
    assert {path.name for path in cluster.iterdir()} == {"bin"}


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--gpus-per-node", "3"), "rows 48:16: 3 processes can't share 48 current and 16 past rows equally"),
        (("--cluster", "partitoin=gpu"), "submitit: "),
        (("--seeds", "0-2"), "a table has a job for each of its --seeds"),
        (("--overwrite",), "can't --overwrite"),
        (("--launcher", "slrum"), "no launcher called 'slrum'; did you mean 'slurm'"),
        (("--launcher", "here", "--nodes", "2"), "are of --launcher slurm"),
        (("--cluster", "tasks_per_node=0"), "1 nodes with 0 tasks each can't share a run"),
    ],
)
def test_what_can_not_be_submitted_is_refused_in_one_line(cluster: Path, words: tuple[str, ...], text: str) -> None:
    told = cilnorm(*words)
    assert told.exit_code == 2
    assert text in told.stderr
    assert len(told.stderr.splitlines()) == 1
    assert not (cluster / "asked").exists()
