"""A run of two or four processes equals that of one: losses, gradients, statistics, weights, exemplars, accuracies.

The processes are started once and do all the runs, one after another.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import signal
import sys
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from cilnorm.batch import Batch
from cilnorm.experiment import runner
from cilnorm.experiment.assembly import assemble
from cilnorm.experiment.feeding import seen_batches
from cilnorm.hookspecs import Norm
from cilnorm.registry import Registry, load
from cilnorm.spec import Settings, SpecError, resolve
from cilnorm.storage.checkpoint import Checkpoints, RunState
from cilnorm.testing import toys
from cilnorm.training.engine import Engine
from cilnorm.training.fast_engines import engine_class
from cilnorm.training.place import Place
from cilnorm.training.ranks import Ranks, joined
from tests import fake
from tests.conftest import TINY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),  # the first to want the pair of processes waits for all runs
    pytest.mark.skipif(sys.platform == "win32", reason="processes are forked, and told things by signals"),
]

PRESET = {**TINY, "tasks": 2, "rows": [8, 4], "memory": 12, "schedule": {"epochs": 1, "lr": 0.05, "momentum": 0.9}}
SMALL = {"dataset.classes": 4, "dataset.train": 12, "dataset.test": 5}
NORMS = list(load().norms)
METHODS = (
    "eeil", "lucir", "podnet", "ssil", "afc", "wa", "er-ace", "der", "foster", "joint", "icarl", "der++", "bic",
    "two-phases",
)  # fmt: skip
OTHERWISE = ("eeil", "lucir", "ssil", "afc", "der", "bic")  # whose released code takes other steps
WELL_SCALED = {"nbn": {"norm.floor": 1.0}}  # with its 1e-6 the gradient of β is rounding, a million times over


TEN = {"method": "lucir", "norm": "tbbn", "precision": "fp64", "dataset.classes": 20, "tasks": 10, "memory": 40}
LEFT = {"dataset.train": 13, "first_classes": 3}  # a last batch of 3 rows in the first task, of 1 in the second
SHUFFLED: dict[str, dict[str, Any]] = {
    **{norm: {"norm": norm, **LEFT} for norm in ("bn", "tbbn", "adab2n", "cbbn", "brn", "sn")},
    "even": {"norm": "tbbn", "dataset.train": 13},  # a last batch of 2 rows in both
    "exact": {"norm": "tbbn", "norm.splits": "exact", "norm.affine_gradient": "balanced", **LEFT},
    "deep": {"norm": "tbbn", "backbone": "resnet8", "schedule.epochs": 2, **LEFT},
    "streamed": {"norm": "tbbn", "residence": "stream", **LEFT},
    "pycil": {"method": "lucir", "norm": "tbbn", "protocol": "pycil", **LEFT},
    **{method: {"method": method, "norm": "tbbn", **LEFT} for method in ("ssil", "der++", "podnet", "eeil")},
}


@dataclass(frozen=True)
class Case:
    """A run, and the type of its numbers."""

    name: str
    asked: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64

    def __str__(self) -> str:
        return self.name


CASES = [
    *(Case(f"ft-{norm}", {"norm": norm, **WELL_SCALED.get(norm, {})}) for norm in NORMS),
    Case("single", {"norm": "tbbn"}, torch.float32),
    Case("exact", {"norm": "tbbn", "norm.splits": "exact"}),
    Case("tasks of other sizes", {"norm": "tbbn", "norm.unit": "classes", "first_classes": 3}),
    *(Case(f"{method}-tbbn", {"method": method, "norm": "tbbn"}) for method in METHODS),
    *(Case(f"{method}-released", {"method": method, "protocol": "released"}) for method in OTHERWISE),
    Case("lucir-single", {"method": "lucir", "norm": "tbbn"}, torch.float32),
    Case("three tasks", {"method": "lucir", "norm": "tbbn", "dataset.classes": 6, "tasks": 3}),
    Case("ten tasks", TEN, torch.float32),
    Case("deep", {"method": "lucir", "norm": "tbbn", "backbone": "resnet8", "schedule.epochs": 2, "schedule.lr": 0.2}),
    Case("no memory", {"method": "lucir", "memory": 0}),
    Case("nme", {"method": "icarl", "classifier": "nme", "protocol.herding": "icarl"}),
    Case("best", {"protocol.validation": 0.25, "protocol.keep": "best"}),
    Case("frozen", {"statistics.freeze": "after-first"}),
    Case("precise", {"statistics.precise": "class-balanced"}),
    Case("precise-odd", {"norm": "tbbn", "statistics.precise": "class-balanced", "dataset.train": 19}),  # 3 batches
    Case("precise-few", {"norm": "brn", "statistics.precise": "class-balanced", "memory": 8}),  # 1 batch in the end
    *(Case(f"precise-{norm}", {"norm": norm, "statistics.precise": "class-balanced"}) for norm in ("adab2n", "sn")),
    *(Case(f"afc-{norm}", {"method": "afc", "norm": norm}) for norm in ("bn", "brn", "cbbn")),
    Case("clipped", {"schedule.clip": 0.1}),
    Case("streamed", {"residence": "stream"}),
    Case("compiled", {"method": "lucir", "norm": "tbbn", "engine": "compile"}),
    Case("compiled-shuffled", {"norm": "bn", "engine": "compile", "protocol.batches": "shuffled", **LEFT}),
    *(Case(f"shuffled-{name}", {"protocol.batches": "shuffled", **asked}) for name, asked in SHUFFLED.items()),
]


@dataclass
class Found:
    """What a run leaves: the terms of each epoch, the gradients of the first step of each phase, and its end.

    ``compiled`` counts the graphs that were handed to a compiler.
    """

    terms: list[dict[str, float]]
    gradients: list[dict[str, Tensor]]
    weights: dict[str, Tensor]
    memory: list[list[int]]
    matrix: list[list[float]]
    summary: dict[str, Any]
    compiled: int


def learn(case: Case, folder: Path, registry: Registry) -> Found:
    """Does the run of a case in this process, or its part of it."""
    gradients: list[dict[str, Tensor]] = []
    graphs: list[Any] = []
    spec = resolve("preset", registry, Settings({"preset": PRESET}, {}), **{**SMALL, **case.asked})
    base: Any = engine_class(spec.engine, torch.device("cpu"), 2)
    whole = torch.nn.Module.compile

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    class Recorder(base):  # type: ignore[misc]
        seen = 0

        def update(self, batch: Batch) -> None:
            super().update(batch)
            if not self.seen:
                named = self.net.named_parameters()
                gradients.append({name: each.grad.clone() for name, each in named if each.grad is not None})
            self.seen += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "draw_figures", lambda *_: None)  # takes longer than the run
        patch.setattr(runner, "engine_class", lambda *_: Recorder)
        patch.setattr(torch.nn.Module, "compile", lambda module: whole(module, backend=backend))
        torch.set_default_dtype(case.dtype)
        try:
            result = runner.run(spec, folder, device="cpu", registry=registry)
        finally:
            torch.set_default_dtype(torch.float32)
    last = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    terms = [event["terms"] for event in events if event["event"] == "epoch"]
    memory = [kept.tolist() for kept in last["memory"]]
    summary = {name: value for name, value in result.summary.items() if name != "seconds"}
    return Found(terms, gradients, last["net"], memory, result.matrix, summary, len(graphs))


def enter(rank: int, size: int, store: Path, timeout: float = 300.0) -> Registry:
    """Makes this process one of several, as ``torchrun`` would."""
    torch.set_num_threads(1)
    names = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": 1}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}})
    meeting = distributed.FileStore(str(store), size)
    patience = timedelta(seconds=timeout)
    distributed.init_process_group("gloo", store=meeting, rank=rank, world_size=size, timeout=patience)
    return load(extra=[fake])


def work(rank: int, folder: Path, cases: list[Case], size: int) -> None:
    registry = enter(rank, size, folder / "store")
    found = [learn(case, folder / f"run {number}", registry) for number, case in enumerate(cases)]
    torch.save([vars(each) for each in found], folder / f"{rank}.pt")


def start(folder: Path, cases: list[Case], size: int) -> None:
    """Does the cases in so many processes, which are forked off one that has imported all this already."""
    multiprocessing.set_forkserver_preload([__name__])
    torch.multiprocessing.start_processes(work, (folder, cases, size), nprocs=size, start_method="forkserver")


@functools.cache
def alone(number: int) -> dict[str, Any]:
    """What one process finds."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        case = replace(CASES[number], asked={**CASES[number].asked, "engine": "eager"})
        return vars(learn(case, Path(folder) / "run", load(extra=[fake])))


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """What each of two processes finds, case by case."""
    folder = tmp_path_factory.mktemp("ranks")
    start(folder, CASES, 2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("number", range(len(CASES)), ids=map(str, CASES))
def test_two_processes_equal_one(together: list[list[dict[str, Any]]], number: int) -> None:
    double = CASES[number].dtype == torch.float64 or CASES[number].asked.get("precision") == "fp64"
    tolerance = 1e-10 if double else 1e-5
    close = {"rtol": tolerance, "atol": tolerance}
    expected = alone(number)
    assert expected["gradients"]
    for found in (ranks[number] for ranks in together):
        for name in ("terms", "gradients", "weights"):
            compare(name, found[name], expected[name], close)
        assert found["memory"] == expected["memory"]
        assert found["matrix"] == expected["matrix"]
        assert bool(found["compiled"]) == (CASES[number].asked.get("engine") == "compile")


def compare(name: str, found: Any, expected: Any, close: dict[str, float]) -> None:
    """Raises AssertionError, with the name of what differs."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            compare(f"{name}.{key}", found[key], value, close)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for at, value in enumerate(expected):
            compare(f"{name}.{at}", found[at], value, close)
    else:
        torch.testing.assert_close(found, expected, **close, msg=lambda text: f"{name}: {text}")


FOUR = [case for case in CASES if case.name == "lucir-tbbn"]


def test_four_processes_equal_one(tmp_path: Path) -> None:
    start(tmp_path, FOUR, 4)
    for at, case in enumerate(FOUR):
        expected = alone(CASES.index(case))
        for rank in range(4):
            found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)[at]
            for name in ("terms", "gradients", "weights"):
                compare(name, found[name], expected[name], {"rtol": 1e-10, "atol": 1e-10})
            assert found["memory"] == expected["memory"]


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"rows": [8, 3]}, "rows 8:3: 2 processes can't share 8 current and 3 past rows equally; 1 can"),
        ({"rows": [8, 5], "protocol.batches": "shuffled"}, "2 processes can't share 13 rows equally; 1, 13 can"),
        ({"norm": "of-torch"}, "of-torch: BatchNorm2d has no synchronise.group.*run it in one process instead of 2"),
        ({"norm": "gn"}, "gn: its record says one_process: .*; run it in one process instead of 2"),
    ],
)
def test_what_processes_can_not_share_is_refused_before_training(asked: dict[str, Any], text: str) -> None:
    changed = load().norms["gn"] if asked.get("norm") == "gn" else Norm("of-torch", torch.nn.BatchNorm2d)
    registry = toys.registry_with("norm", replace(changed, one_process=True))
    spec = toys.toy_spec(registry, backbone="resnet8", **{"rows": [8, 4], **asked})
    with pytest.raises(SpecError, match=text):
        assemble(spec, registry, torch.device("cpu"), None, Ranks(Place(0, 2, 0, 2)))


@pytest.mark.parametrize(("method", "own"), [("afc", 6), ("two-phases", 12)])
def test_rows_that_a_method_measures_are_shared_if_it_can_do_with_means(method: str, own: int) -> None:
    registry = load(extra=[fake])
    spec = resolve("preset", registry, Settings({"preset": PRESET}, {}), method=method, **SMALL)
    parts = assemble(spec, registry, torch.device("cpu"), None, Ranks(Place(1, 2, 1, 2)))
    run: Any = SimpleNamespace(spec=spec, parts=parts, state=RunState())
    batches = list(seen_batches(run, parts.stream.tasks[0]))
    assert len(batches) == 2
    assert all(len(batch.images) == len(batch.targets) == batch.composition.rows == own for batch in batches)


# What goes wrong.


def hurt(rank: int, folder: Path, action: str, victim: int, timeout: float) -> None:
    """A process of a run of which one, at its third step, does what ``action`` says; leaves what it ended with."""
    registry, said = enter(rank, 2, folder / "store", timeout), ""

    class Victim(Engine):
        steps = 0

        def update(self, batch: Batch) -> None:
            super().update(batch)
            Victim.steps += 1
            if rank == victim and Victim.steps == 3:
                if action == "error":
                    raise OSError(5, "Input/output error", "images")
                os.kill(os.getpid(), getattr(signal, action))

    spec = resolve("preset", registry, Settings({"preset": HURT}, {}), **SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "draw_figures", lambda *_: None)
        patch.setattr(runner, "engine_class", lambda *_: Victim)
        patch.setattr(runner, "joined", functools.partial(joined, timeout=timedelta(seconds=timeout)))
        if action == "full disk":
            patch.setattr(Checkpoints, "write", full_disk)
        try:
            runner.run(spec, folder / "run", device="cpu", registry=registry)
        except BaseException as error:
            said = f"{type(error).__name__} {getattr(error, 'told', False)}: {error}"
    (folder / f"{rank}.txt").write_text(said)
    os._exit(0)


def full_disk(self: Checkpoints, *_: Any) -> None:
    raise OSError(28, "No space left on device", str(self.last))


HURT = {**PRESET, "norm": "tbbn", "schedule": {"epochs": 2, "lr": 0.05, "momentum": 0.9}}
LOST = "RunStopped True: task 1, epoch 2: another process of the run ended; the same command goes on"


@pytest.mark.parametrize(
    ("action", "victim", "said"),
    [
        ("SIGKILL", 1, {0: LOST}),
        ("SIGKILL", 0, {1: LOST}),
        ("SIGTERM", 1, dict.fromkeys((0, 1), "Interrupted False: interrupted at task 1, epoch 2; `cilnorm resume")),
        ("SIGSTOP", 1, {0: "RunStopped False: task 1, epoch 2: another process of the run did not answer in time"}),
        ("error", 1, {0: LOST, 1: "RunStopped False: task 1, epoch 2: images: Input/output error"}),
        ("full disk", -1, {0: "RunStopped False: task 1, epoch 2: ", 1: "ToldElsewhere True: on "}),
    ],
)
def test_all_processes_stop_with_one_and_the_same_run_goes_on(
    action: str, victim: int, said: dict[int, str], tmp_path: Path, registry: Registry
) -> None:
    multiprocessing.set_forkserver_preload([__name__])
    context = multiprocessing.get_context("forkserver")
    timeout = 10.0 if action == "SIGSTOP" else 120.0
    processes = [context.Process(target=hurt, args=(rank, tmp_path, action, victim, timeout)) for rank in range(2)]
    for process in processes:
        process.start()
    for rank in said:
        processes[rank].join(120)
    for process in processes:
        process.kill()
        process.join()
    for rank, text in said.items():
        assert (tmp_path / f"{rank}.txt").read_text().startswith(text)
    spec = resolve("preset", registry, Settings({"preset": HURT}, {}), **SMALL)
    told: list[str] = []
    watch = [lambda event: told.append(event["text"]) if event["event"] == "warning" else None]
    again = runner.run(spec, tmp_path / "run", device="cpu", registry=registry, go_on=True, watch=watch)
    whole = runner.run(spec, tmp_path / "whole", device="cpu", registry=registry)
    assert again.matrix == whole.matrix
    assert len(told) == 1
    assert "processes 1, was 2" in told[0]
