"""A norm on two processes, each with half of the rows, against the same norm on one process with all of them."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from cilnorm.batch import Composition
from cilnorm.experiment.assembly import why_not_shared
from cilnorm.hookspecs import Norm
from cilnorm.registry import text_of
from cilnorm.testing.checks import Broken, NotChecked, attempt, equal
from cilnorm.testing.layers import CHANNELS, made
from cilnorm.testing.toys import rows, tell

__all__ = ["two_processes"]

PROCESSES = 2
TOLD = (Composition(12, 4, 3), Composition(10, 0, 3))  # of each process
PATIENCE = 30.0  # seconds that one waits for the other
Found = dict[str, Tensor]


def two_processes(record: Norm) -> None:
    """Output, gradients and running statistics of two training steps, for batches with past rows and without."""
    layer = made(record, told=False).double()
    refused = why_not_shared(record, layer)
    if refused:
        raise NotChecked(f"a run of several processes is refused: {refused}")
    shared = any(callable(getattr(module, "synchronise", None)) for module in layer.modules())
    found = (
        _together(layer) if shared else [[_steps(copy.deepcopy(layer), told, [at]) for told in TOLD] for at in range(2)]
    )
    for at, told in enumerate(TOLD):
        _compare([process[at] for process in found], _steps(copy.deepcopy(layer), told, range(PROCESSES)), told)


def _steps(layer: nn.Module, told: Composition, owners: Sequence[int]) -> Found:
    """What two steps on the rows of some processes give; current rows of all come first, as in any batch.

    The two have different means, so that statistics of one's rows alone are far off.
    """
    tell(layer, told, copies=len(owners))
    found: Found = {}
    for step in range(2):
        parts = [rows(CHANNELS, 3, 5, count=told.rows, dtype=torch.float64, seed=2 * at + step) for at in owners]
        parts = [part * (1 + at) + at for part, at in zip(parts, owners, strict=True)]
        x = _whole(parts, told).requires_grad_()
        y = layer(x)
        y.sin().sum().backward()
        assert x.grad is not None
        found |= {f"output {step}": y.detach(), f"gradient of the input {step}": x.grad}
    for name, parameter in layer.named_parameters():
        found[f"gradient of {name}"] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return found | {f"buffer {name}": buffer.clone() for name, buffer in layer.named_buffers()}


def _whole(parts: Sequence[Tensor], told: Composition) -> Tensor:
    return torch.cat([part[: told.current] for part in parts] + [part[told.current :] for part in parts])


def _compare(found: Sequence[Found], expected: Found, told: Composition) -> None:
    """Rows of the processes side by side, the sum of their gradients, and the buffers of each are those of one."""
    said = (
        f"two processes with {told.rows} rows each compute otherwise than one with all; give the layer "
        "synchronise(group=None), from which on training sums what it measures over the processes, forward and "
        "backward (as torch.distributed.nn.functional.all_reduce does), or say one_process=True in the record"
    )
    for name, value in expected.items():
        of_each = [process[name] for process in found]
        if name.startswith(("output", "gradient of the input")):
            of_each = [_whole(of_each, told)]
        elif name.startswith("gradient"):
            of_each = [torch.stack(of_each).sum(0)]
        for one in of_each:
            scale = max(1.0, float(value.abs().max()))
            equal(one / scale, value / scale, f"{said}: {name.rstrip(' 01')} differs", 1e-8)


def _together(layer: nn.Module) -> list[list[Found]]:
    """What each of two processes finds."""
    if not (distributed.is_available() and distributed.is_gloo_available()):
        raise NotChecked("this torch has no gloo, through which two processes could talk")
    packed = attempt(lambda: pickle.dumps(layer), "the layer can't be pickled, so no other process can have it")
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    if forks:
        multiprocessing.set_forkserver_preload([__name__])  # torch is imported once
    context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        processes = [context.Process(target=_work, args=(at, place, packed), daemon=True) for at in range(PROCESSES)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(4 * PATIENCE)
        for process in processes:
            process.kill()
            process.join()
        errors = sorted(place.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
        if errors:
            raise Broken(f"in one of two processes it raised {errors[0].read_text(encoding='utf-8')}")
        try:
            return [torch.load(place / f"{at}.pt", weights_only=True) for at in range(PROCESSES)]
        except FileNotFoundError as error:
            raise Broken(
                "two processes that share a batch did not end; each must send what the others wait for"
            ) from error


def _work(at: int, folder: Path, packed: bytes) -> None:
    """Does the steps in one of the processes. Its group ends with it: ended by hand, torch 2.6 hangs now and then."""
    torch.set_num_threads(1)
    try:
        store = distributed.FileStore(str(folder / "store"), PROCESSES)
        patience = timedelta(seconds=PATIENCE)
        distributed.init_process_group("gloo", store=store, rank=at, world_size=PROCESSES, timeout=patience)
        found = []
        for told in TOLD:
            layer: Any = pickle.loads(packed)
            for module in layer.modules():
                if callable(getattr(module, "synchronise", None)):
                    module.synchronise()
            found.append(_steps(layer, told, [at]))
        torch.save(found, folder / f"{at}.pt")
    except Exception as error:  # whatever a stranger's code runs into
        (folder / f"{at}.error").write_text(" ".join(text_of(error).split())[:200], encoding="utf-8")
