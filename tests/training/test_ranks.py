"""Shares of rows and images, and what is refused, without a second process."""

from __future__ import annotations

import pytest
import torch

from cilnorm.batch import Composition
from cilnorm.experiment.assembly import pick_device
from cilnorm.training.fast_engines import engine_class
from cilnorm.training.place import Place, place
from cilnorm.training.ranks import ALONE, Ranks
from cilnorm.values import SpecError

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "29500"}


def all_of(size: int) -> list[Ranks]:
    return [Ranks(Place(index, size, index, size)) for index in range(size)]


def test_place_is_what_torchrun_says() -> None:
    assert place({}) == Place()
    assert place({"RANK": "3", "WORLD_SIZE": "4"}) == Place()  # somebody else's variables
    found = place({**TORCHRUN, "LOCAL_WORLD_SIZE": "2"})
    assert found == Place(3, 4, 1, 2)
    assert not found.leads
    with pytest.raises(SpecError, match="not as torchrun sets them"):
        place({**TORCHRUN, "RANK": "first"})


@pytest.mark.parametrize("size", [1, 2, 4])
def test_shares_of_rows_are_the_whole_batch_each_row_once(size: int) -> None:
    whole = Composition(12, 4, 2, (4, 2))
    parts = [ranks.rows(whole) for ranks in all_of(size)]
    assert sorted(torch.cat(parts).tolist()) == list(range(16))
    for ranks, rows in zip(all_of(size), parts, strict=True):
        own = ranks.composition(whole)
        assert (own.rows, own.task, own.classes) == (len(rows), 2, (4, 2))
        assert (rows[: own.current] < 12).all()
        assert (rows[own.current :] >= 12).all()


@pytest.mark.parametrize(("size", "current", "past"), [(2, 7, 5), (2, 11, 1), (4, 3, 13), (4, 14, 2), (4, 1, 7)])
def test_rows_whose_kinds_do_not_divide_are_taken_in_order(size: int, current: int, past: int) -> None:
    """So that together the processes hold the batch as one process would, row by row."""
    whole = Composition(current, past, 2, (4, 2))
    parts = [ranks.rows(whole) for ranks in all_of(size)]
    assert torch.cat(parts).tolist() == list(range(whole.rows))
    assert len({len(rows) for rows in parts}) == 1
    for ranks, rows in zip(all_of(size), parts, strict=True):
        assert ranks.can_share(whole)
        assert not ranks.evenly(whole)
        own = ranks.composition(whole)
        assert (own.current, own.past) == (int((rows < current).sum()), int((rows >= current).sum()))
    assert not all_of(3)[0].can_share(Composition(15, 7, 2))


@pytest.mark.parametrize("count", [1, 5, 6, 7])
def test_shares_of_images_stand_in_order(count: int) -> None:
    indices = torch.arange(count) + 100
    shares = [ranks.share(indices) for ranks in all_of(3)]
    assert len({len(share) for share in shares}) == 1
    assert torch.equal(torch.cat(shares)[:count], indices)


def test_alone_nothing_is_copied() -> None:
    values = torch.ones(3)
    assert ALONE.share(values) is ALONE.gather(values, 3) is values
    assert ALONE.first(lambda: values) is values


def test_rows_that_do_not_divide_are_refused_with_numbers_that_do() -> None:
    ranks = all_of(3)[0]
    ranks.refuse(Composition(12, 3, 1))
    with pytest.raises(
        ValueError, match="3 processes can't share 16 current and 8 past rows equally; 1, 2, 4, 8 can, "
    ):
        ranks.refuse(Composition(16, 8, 1))
    with pytest.raises(ValueError, match="with 3 take 15 and 9 rows"):
        ranks.refuse(Composition(16, 8, 1))


def test_a_graph_is_of_one_process() -> None:
    cuda = torch.device("cuda")
    assert engine_class("auto", cuda, 2) is engine_class("eager", cuda)
    with pytest.raises(ValueError, match="engine graph is for one process, 2 share this run"):
        engine_class("graph", cuda, 2)


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SpecError, match="3 processes on this machine, and 2 GPUs"):
        pick_device("cuda", Place(0, 3, 0, 3))
    with pytest.raises(SpecError, match="cuda:1 is one GPU; give --device cuda or cpu"):
        pick_device("cuda:1", Place(0, 2, 0, 2))
    assert pick_device("cpu", Place(0, 2, 0, 2)).type == "cpu"
