"""One run that many processes of a cluster share: a job whose tasks find each other, and begin or continue the run.

Every task sets what ``torchrun`` would set, by submitit's ``TorchDistributedEnvironment``, and starts the command of
the run. What the processes do together, and what happens when one of them dies, is that of any shared run
(``cilnorm.training.ranks``); the job as a whole is queued, requeued and submitted again as that of a table's cell is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cilnorm.registry import Registry
from cilnorm.sweep.jobs import Job
from cilnorm.sweep.slurm import Submission, executor, submit
from cilnorm.training.place import Place
from cilnorm.training.ranks import PlannedRanks, Ranks
from cilnorm.values import SpecError

__all__ = ["Share", "SharedJob", "SharedSubmission", "files_of", "submit_shared"]


@dataclass(frozen=True)
class Share:
    """The machines that share a run.

    Attributes:
        nodes: how many.
        gpus_per_node: of each; a process each. With none there is one process a machine, or ``tasks_per_node``.
        settings: further ones of submitit: ``timeout_min``, ``slurm_partition``, ``tasks_per_node``, ...
        cluster: ``slurm``, or ``local`` for processes on this machine.

    Raises:
        SpecError: numbers that make no sense.
    """

    nodes: int = 1
    gpus_per_node: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    cluster: str = "slurm"

    def __post_init__(self) -> None:
        if not isinstance(self.tasks_per_node, int) or min(self.nodes, self.tasks_per_node) < 1:
            raise SpecError(f"{self.nodes} nodes with {self.tasks_per_node} tasks each can't share a run")

    @property
    def tasks_per_node(self) -> int:
        """Processes of each machine."""
        return self.settings.get("tasks_per_node", self.gpus_per_node or 1)

    @property
    def processes(self) -> int:
        """How many share the run."""
        return self.nodes * self.tasks_per_node

    @property
    def ranks(self) -> Ranks:
        """Those processes, before they exist."""
        return PlannedRanks(Place(0, self.processes, 0, self.tasks_per_node))

    @property
    def parameters(self) -> dict[str, Any]:
        """What submitit is asked for."""
        gpus = {"gpus_per_node": self.gpus_per_node} if self.gpus_per_node else {}
        return {"nodes": self.nodes, "tasks_per_node": self.tasks_per_node, **gpus, **self.settings}


class SharedJob(Job):
    """A run that is begun or continued by every process that shares it, with the same command."""

    def arguments(self) -> list[str]:
        """The same in every process, whatever each of them sees in the folder yet."""
        return ["run", "--spec", str(self._beside("yaml")), "--out", str(self.folder), "--resume"]


class SharedSubmission(Submission):
    """What each task of the job runs: the process of the run that has this task's place."""

    def __call__(self) -> int:
        from submitit.helpers import TorchDistributedEnvironment

        # A process picks its GPU by its number on the machine, so it is to see all of them.
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        return super().__call__()


def submit_shared(job: SharedJob, share: Share, flags: Sequence[str], registry: Registry) -> Any:
    """Submits the job that does, or goes on with, a run; returns submitit's handle, or None if it is queued already.

    submitit's own files lie in ``FOLDER.submitit``, what the processes print in ``FOLDER.log``.

    Raises:
        SpecError: no submitit or cluster here, a setting that it does not know, rows that can't be shared.
        FolderError: the folder holds another run, or can't be written.
    """
    share.ranks.refuse_rows(job.spec.rows, job.spec.keeps_exemplars and job.spec.protocol.batches == "stratified")
    on = executor(files_of(job.folder), share.cluster, share.parameters)
    job.prepare(registry)
    return submit([job], flags, on, SharedSubmission).get(job)


def files_of(folder: Path) -> Path:
    """Where submitit keeps its files about a run."""
    return folder.absolute().with_name(f"{folder.name}.submitit")
