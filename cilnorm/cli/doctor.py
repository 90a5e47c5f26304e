"""What is installed, what is found, and whether it works: the first thing to ask when something is odd."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed

from cilnorm.files import write_atomically
from cilnorm.hookspecs import Dataset
from cilnorm.images import ImageFiles
from cilnorm.registry import Registry, contain_exit
from cilnorm.storage.environment import describe, version

__all__ = ["Finding", "examine"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, what there is to say, and whether it is as it should be."""

    name: str
    text: str
    healthy: bool = True


def examine(registry: Registry, data_root: Path | None = None, out: Path = Path("runs")) -> Iterator[Finding]:
    """Looks at versions, device, plugins, data sets, the place of runs, and norms that bring a check of themselves.

    Nothing is fetched. A data set that is there is read and verified, which takes seconds; files of
    images are counted.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = describe(registry, device)
    yield Finding("versions", ", ".join(f"{name} {known}" for name, known in found["packages"].items() if known))
    threads, capability = found["threads"], found["cpu_capability"]
    yield Finding("device", f"{device}, {found['device_name']}, {threads} threads, {capability}, BLAS {found['blas']}")
    yield _processes()
    for plugin in registry.plugins:
        if plugin.error:
            yield Finding(f"plugin {plugin.name}", f"{plugin.distribution}: {plugin.error}", False)
    yield Finding("plugins", f"{sum(not plugin.error for plugin in registry.plugins)} healthy")
    for record in registry.datasets.values():
        yield _dataset(record, data_root)
    yield _writable(out)
    for norm in registry.norms.values():
        if norm.check is not None:
            began = time.perf_counter()
            try:
                with contain_exit("its check"):
                    norm.check()
            except Exception as error:  # whatever a stranger's check runs into
                yield Finding(f"norm {norm.name}", f"differs from its reference: {_line(error)}", False)
            else:
                yield Finding(f"norm {norm.name}", f"equals its reference ({time.perf_counter() - began:.1f} s)")


def _processes() -> Finding:
    """What several processes that share one run would talk through, and how many there may be on GPUs."""
    offered = (("gloo", "is_gloo_available"), ("NCCL", "is_nccl_available"))
    there = [name for name, asked in offered if getattr(distributed, asked, bool)()]  # a torch may have none of it
    gpus = torch.cuda.device_count()
    if not there:
        return Finding("several processes", "this torch can't share a run among processes")
    shared = f"{gpus} GPUs, one a process" if gpus and "NCCL" in there else "no GPU to share, so they share the cores"
    cluster = f"submitit {found}" if (found := version("submitit")) else "no submitit, which --launcher slurm needs"
    return Finding("several processes", f"{' and '.join(there)}; {shared}; {cluster}")


def _dataset(record: Dataset, root: Path | None) -> Finding:
    name = f"data set {record.name}"
    try:
        with contain_exit("it"):
            if record.found is None or not record.found(root):
                return Finding(name, "not here; it is fetched or made when it is first used")
            images = record.build(root)
    except Exception as error:  # whatever a stranger's source runs into
        return Finding(name, _line(error), False)
    if isinstance(images, ImageFiles):
        counts = f"{len(images.train)} + {len(images.test)} files of {images.classes} classes, not decoded here"
        return Finding(name, f"{counts}{images.notice and '; ' + images.notice}")
    counts = f"{len(images.train_images)} + {len(images.test_images)} images of {images.classes} classes"
    return Finding(name, f"{counts}, SHA-256 {images.digest[:12]}{images.notice and '; ' + images.notice}")


def _writable(out: Path) -> Finding:
    """Whether a run could be written: made, flushed, renamed."""
    place = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryDirectory(dir=place) as folder:
            write_atomically(Path(folder) / "file", b"")
        free = os.statvfs(place)
    except OSError as error:
        return Finding("runs", f"can't write in {place}: {error.strerror or error}", False)
    return Finding("runs", f"can be written in {place}, {free.f_bavail * free.f_frsize / 2**30:.1f} GiB free")


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
