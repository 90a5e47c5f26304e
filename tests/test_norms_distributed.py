"""Two processes with half of the rows each compute what one process computes on all of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import cilnorm
from cilnorm import registry
from cilnorm.batch import Composition
from cilnorm.norms import convert_sync, finish_norms, norm_act_factory, norm_factory
from cilnorm.testing.toys import tell

pytestmark = pytest.mark.slow

NAMES = list(registry.load().norms)
# Of each process: a number of splits (8) that doesn't divide its current rows, one that does, and no past rows at all.
COMPOSITIONS = [Composition(12, 4, 3), Composition(24, 8, 4), Composition(10, 0, 3)]
RANKS = 2
WELL_SCALED = {"nbn": {"floor": 1.0}}  # with its 1e-6 the gradient of β is rounding, a million times over
# Rows in any order, unequally many of each kind: the step between past rows of either process.
MIXED: list[tuple[dict[str, Any], tuple[int, int]]] = [
    ({}, (4, 2)),
    ({"splits": "divisor"}, (4, 3)),
    ({"splits": "exact", "affine_gradient": "balanced"}, (5, 2)),
]


def mixed_rows(rank: int, gaps: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A process's mask, every so many-th row past, and its rows."""
    mask = torch.arange(16) % gaps[rank] == 1
    return mask, rows(Composition(16, 0, 0), rank)


def cases() -> list[tuple[str, int, dict[str, Any]]]:
    """Every norm with every composition, and the option that weighs rows instead of splitting them."""
    told = range(len(COMPOSITIONS))
    plain = [(name, index, WELL_SCALED.get(name, {})) for name in NAMES for index in told]
    return [*plain, ("tbbn", 0, {"splits": "exact"}), ("tbbn", 0, {"affine_gradient": "balanced"})]


def network(name: str, options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    norm_act = norm_act_factory(name, "silu", **options) if name != "bn" else norm_factory(name)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), norm_factory(name, **options)(8), nn.Conv2d(8, 8, 1), norm_act(8))
    return finish_norms(net, name).double()


def rows(composition: Composition, rank: int) -> Tensor:
    """A process's rows; the two have different means, so that statistics of one alone are far off."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(composition.rows, 3, 5, 5, dtype=torch.float64, generator=generator) * (1 + rank) + rank


def step(net: nn.Module, inputs: list[Tensor], share: float) -> dict[str, Tensor]:
    """Output, gradients and buffers of two steps on the rows in ``inputs``, whose loss weighs ``share``."""
    for x in inputs:
        x.requires_grad_()
        y = net(x)
        (y.sin().sum() * share).backward()
    inner = net.module if isinstance(net, DistributedDataParallel) else net
    gradients = {f"gradient of {name}": parameter.grad for name, parameter in inner.named_parameters()}
    return {"y": y.detach(), "gx": inputs[-1].grad} | gradients | dict(inner.named_buffers())


def work(rank: int, folder: Path) -> None:
    store = distributed.FileStore(str(folder / "store"), RANKS)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    results = []
    for name, index, options in cases():
        composition = COMPOSITIONS[index]
        net = convert_sync(network(name, options))
        copy.deepcopy(net)  # a teacher
        tell(net, composition)
        inputs = [rows(composition, rank), rows(composition, rank + RANKS)]
        results.append(step(DistributedDataParallel(net), inputs, 1.0))
    for options, gaps in MIXED:
        net = DistributedDataParallel(convert_sync(network("tbbn", options)))
        mask, x = mixed_rows(rank, gaps)
        with cilnorm.rows(net, past=mask, task=4):
            results.append(step(net, [x], 1.0))
    torch.save(results, folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (folder,), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def gathered(parts: list[Tensor], composition: Composition) -> Tensor:
    """The rows of all processes as one batch: current ones first, then past ones."""
    return torch.cat([p[: composition.current] for p in parts] + [p[composition.current :] for p in parts])


@pytest.mark.parametrize("case", range(len(cases())), ids=[f"{n}-{i}-{'-'.join(map(str, o))}" for n, i, o in cases()])
def test_two_processes_equal_one(two_processes: list[list[dict[str, Tensor]]], case: int) -> None:
    name, index, options = cases()[case]
    told = COMPOSITIONS[index]
    net = network(name, options)
    tell(net, told, RANKS)
    batches = [gathered([rows(told, rank + RANKS * each) for rank in range(RANKS)], told) for each in range(2)]
    expected = step(net, batches, 1 / RANKS)  # for DDP averages the gradients of parameters over processes
    shares = [results[case] for results in two_processes]
    close = {"rtol": 1e-8, "atol": 1e-10}
    torch.testing.assert_close(gathered([share["y"] for share in shares], told), expected.pop("y"), **close)
    torch.testing.assert_close(gathered([share["gx"] for share in shares], told), RANKS * expected.pop("gx"), **close)
    for share in shares:
        for key, value in expected.items():
            torch.testing.assert_close(share[key], value, **close, msg=lambda text, key=key: f"{key}: {text}")


def test_every_layer_with_running_averages_can_be_synchronised() -> None:
    for name in NAMES:
        layer = norm_factory(name)(8)
        assert hasattr(layer, "synchronise") == bool(list(layer.buffers()))


@pytest.mark.parametrize("case", range(len(MIXED)))
def test_two_processes_with_rows_in_any_order_equal_one(
    two_processes: list[list[dict[str, Tensor]]], case: int
) -> None:
    """And the processes need not hold equally many rows of a kind."""
    options, gaps = MIXED[case]
    net = network("tbbn", options)
    masks, parts = zip(*(mixed_rows(rank, gaps) for rank in range(RANKS)), strict=True)
    assert masks[0].sum() != masks[1].sum()
    with cilnorm.rows(net, past=torch.cat(masks), task=4):
        expected = step(net, [torch.cat(parts)], 1 / RANKS)
    shares = [results[len(cases()) + case] for results in two_processes]
    close = {"rtol": 1e-8, "atol": 1e-10}
    torch.testing.assert_close(torch.cat([share["y"] for share in shares]), expected.pop("y"), **close)
    torch.testing.assert_close(torch.cat([share["gx"] for share in shares]), RANKS * expected.pop("gx"), **close)
    for share in shares:
        for key, value in expected.items():
            torch.testing.assert_close(share[key], value, **close, msg=lambda text, key=key: f"{key}: {text}")
