"""Jobs on a cluster: a run each, which goes on where an earlier job was stopped.

submitit (https://github.com/facebookincubator/submitit) talks to SLURM. A job that is preempted or out of time is put
into the queue again by itself; one that was killed is submitted again with the next call of the same command. A cell of
a table is one process; one large run may be many, a task of its job each (``cilnorm.sweep.shared_run``).
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cilnorm.files import write_atomically
from cilnorm.storage.lock import BUSY, busy
from cilnorm.sweep.jobs import Job
from cilnorm.sweep.workers import PATIENCE, command
from cilnorm.values import SpecError

__all__ = ["Submission", "executor", "submit"]


@dataclass
class Submission:
    """What runs on the cluster: the process that begins or continues a job's run."""

    job: Job
    flags: Sequence[str]

    def __call__(self) -> int:
        """Waits for the process; its exit status. One that an earlier job's process still saves is waited for."""
        self.job.begin()
        until = time.monotonic() + 2 * PATIENCE
        while (code := self._do()) == BUSY and time.monotonic() < until:
            time.sleep(1.0)
        self.job.end(code)
        return code

    def _do(self) -> int:
        if busy(self.job.folder):
            return BUSY
        with open(self.job.log, "ab") as log:
            ours = command(self.job, self.flags, os.getpid())
            with subprocess.Popen(ours, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT) as process:
                try:
                    return process.wait()
                except BaseException:  # the cluster takes the machine back: submitit ends this process
                    _end(process)
                    raise

    def checkpoint(self) -> Any:
        """What is queued when the cluster takes the machine back: the same, which goes on from the last checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Asks a run to save and stop, and kills it if it does not in time."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()


def executor(folder: Path, cluster: str, settings: Mapping[str, Any]) -> Any:
    """submitit's executor, its own files in ``folder``.

    Args:
        cluster: ``slurm``, or ``local`` for processes on this machine.
        settings: submitit's parameters: ``timeout_min``, ``slurm_partition``, ``gpus_per_node``, ...

    Raises:
        SpecError: submitit is not installed, or it does not know a setting.
    """
    if find_spec("submitit") is None:
        raise SpecError("the launcher slurm needs submitit: pip install 'cilnorm[slurm]'")
    import submitit

    try:
        made = submitit.AutoExecutor(folder, cluster=cluster)
        made.update_parameters(**{"name": "cilnorm", "timeout_min": 24 * 60, "cpus_per_task": 2, **settings})
    except (RuntimeError, NameError, TypeError, ValueError) as error:
        raise SpecError(f"submitit: {' '.join(str(error).split())}") from error
    return made


def submit(
    jobs: Sequence[Job],
    flags: Sequence[str],
    on: Any,
    made: Callable[[Job, Sequence[str]], Submission] = Submission,
) -> dict[Job, Any]:
    """Submits the jobs that are in no queue yet; returns submitit's handle of each new one.

    Two jobs never work on one run: the second is refused by the lock of its folder.

    Args:
        made: what runs on the cluster for a job, and the flags of its command.
    """
    handles = {}
    for job in jobs:
        note = job.folder.with_name(f"{job.folder.name}.job")
        if note.exists() and _queued(on, note.read_text(encoding="utf-8").strip()):
            continue
        absolute = replace(job, folder=job.folder.absolute())
        handles[job] = on.submit(made(absolute, list(flags)))
        write_atomically(note, f"{handles[job].job_id}\n")
    return handles


def _queued(on: Any, number: str) -> bool:
    """Whether the cluster still has a job of this number; of a local one nothing is known to a later process."""
    import submitit

    job: Any = (submitit.SlurmJob if on.cluster == "slurm" else submitit.LocalJob)(on.folder, number)
    return str(job.state).upper() in ("PENDING", "RUNNING", "REQUEUED", "CONFIGURING", "COMPLETING", "SUSPENDED")
