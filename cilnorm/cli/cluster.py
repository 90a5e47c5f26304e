"""One run as a job of a cluster: what `cilnorm run --launcher slurm` submits, and how far it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cilnorm.registry import Registry
    from cilnorm.spec import Spec
    from cilnorm.sweep.shared_run import Share

__all__ = ["job_lines", "share_of", "submit_run"]


def share_of(
    launcher: str, nodes: int, gpus_per_node: int, settings: Mapping[str, Any], seeds: str | None = None
) -> Share | None:
    """The machines that are asked for; None where the run is to be done here.

    Raises:
        SpecError: no such launcher, machines are asked for without one, or for several runs.
    """
    from cilnorm.registry import nearest
    from cilnorm.sweep.shared_run import Share
    from cilnorm.values import SpecError

    if launcher not in ("here", "slurm"):
        raise SpecError(nearest("launcher", launcher, ("here", "slurm")))
    if launcher == "slurm":
        if seeds:
            raise SpecError("--launcher slurm is for one run here; a table has a job for each of its --seeds")
        return Share(nodes, gpus_per_node, settings)
    if nodes > 1 or gpus_per_node or settings:
        raise SpecError("--nodes, --gpus-per-node and --cluster are of --launcher slurm")
    return None


def job_lines(share: Share, out: Path | None) -> list[str]:
    """What would be submitted, as lines of a YAML comment.

    Raises:
        SpecError: no submitit or cluster here, or a setting that it does not know.
    """
    from cilnorm.sweep.shared_run import files_of
    from cilnorm.sweep.slurm import executor

    executor(files_of(out or Path("runs") / "NEW"), share.cluster, share.parameters)
    asked = ", ".join(f"{key}={value}" for key, value in share.parameters.items())
    return [f"# one job of {_processes(share)}: {asked}"]


def submit_run(spec: Spec, share: Share, out: Path | None, flags: Sequence[str], how: Mapping[str, Any]) -> None:
    """Submits the job of a run, or says how far it is.

    Args:
        flags: what the run's command is told besides.
        how: ``device``, ``data_root``, ``registry``, ``overwrite`` and ``go_on``, as for a run.

    Raises:
        SpecError, FolderError: nothing was submitted.
    """
    from cilnorm.storage.run_folder import RunFolder, default_folder
    from cilnorm.sweep.jobs import progress
    from cilnorm.sweep.shared_run import SharedJob, submit_shared
    from cilnorm.sweep.workers import options
    from cilnorm.values import SpecError

    registry: Registry = how["registry"]
    if how["overwrite"]:
        raise SpecError("a job may begin more than once, so it can't --overwrite; remove the folder, or give another")
    folder = out or default_folder(spec)
    if not how["go_on"]:
        RunFolder.check(folder, False, registry.logger_files)
    job = SharedJob(folder.name, spec, folder)
    if job.state == "finished":
        print(f"finished: {folder}")
        return
    flags = [*options(how["device"], how["data_root"]), *flags]
    handle = submit_shared(job, share, flags, registry)
    if handle is None:
        print(f"in the queue or at work, {100 * progress(folder, spec):.0f} % done: {folder}")
        return
    print(f"job {handle.job_id} submitted: {_processes(share)}; the run is {folder}, what it prints {job.log}")
    print("the same command with --resume shows how far it is, and submits it again if it was killed")


def _processes(share: Share) -> str:
    each = f"{share.tasks_per_node} process{'es' if share.tasks_per_node > 1 else ''}"
    return f"{each} on each of {share.nodes} machines" if share.nodes > 1 else f"{each} on one machine"
