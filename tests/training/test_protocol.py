"""The order of tasks, splits and epochs: against the released numbers, the tables of the protocol, and by property."""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cilnorm.batch import Composition, Task
from cilnorm.experiment.feeding import draw_phase_pool, lay_out_epoch
from cilnorm.registry import load
from cilnorm.spec import resolve
from cilnorm.training.epoch_plan import EpochPlan, RowSource, plan_epoch
from cilnorm.training.memory import Memory, per_class
from cilnorm.training.protocol import PROTOCOLS, RELEASED, Protocol, Stream, class_order, task_sizes
from tests import golden as gold
from tests.conftest import ROOT

PASSES, CYCLE = Protocol(), Protocol(epoch="cycle")
seeds = st.integers(0, 2**31)


def mixed(
    current: int, past: int, protocol: Protocol, epoch: int = 0, seed: int = 0, rows: tuple[int, int] = (48, 16)
) -> EpochPlan:
    """An epoch of a later task: images 0 .. current-1 are the task's, the next ``past`` ones the memory's."""
    parts = [
        RowSource(torch.arange(current), rows[0], "current"),
        RowSource(torch.arange(current, current + past), rows[1], "past"),
    ]
    return plan_epoch(parts, Composition(*rows, 3), protocol, seed, (3, 0), epoch)


def split_of(labels: Tensor, **options: Any) -> Stream:
    return Stream(labels, labels, range(6), (2, 2, 2), **options)


# The order of classes and the split


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4, 1993])
def test_class_order_is_the_released_one(seed: int) -> None:
    assert class_order(100, seed) == gold.Golden("class_orders_100").arrays[f"seed{seed}"].tolist()


def test_split_is_the_released_one() -> None:
    golden = gold.Golden("data_split")
    meta, arrays = golden.meta, golden.arrays
    order = class_order(12, meta["seed"])
    assert order == arrays["class_order"].tolist()
    sizes = task_sizes(12, meta["num_tasks"])
    assert list(sizes) == arrays["classes_per_task"].tolist()
    train, test = torch.from_numpy(arrays["train_labels"]), torch.from_numpy(arrays["test_labels"])
    stream = Stream(train, test, order, sizes, meta["validation"], meta["seed"])
    for task in stream.tasks:
        key = f"t{task.index}"
        pieces = {
            "trn": (stream.train(task), stream.targets),
            "val": (stream.validation(task), stream.targets),
            "tst": (stream.test(task), stream.test_targets),
        }
        for name, (indices, targets) in pieces.items():
            assert indices.tolist() == arrays[f"{key}_{name}_index"].tolist(), (key, name)
            within = (targets[indices] - task.old).tolist()
            assert within == arrays[f"{key}_{name}_label_in_task"].tolist(), (key, name)


@given(st.integers(1, 300), st.integers(-2, 310))
def test_task_sizes_share_the_classes_evenly(classes: int, tasks: int) -> None:
    if not 1 <= tasks <= classes:
        with pytest.raises(ValueError, match=f"{classes} classes can't be split into {tasks} tasks"):
            task_sizes(classes, tasks)
        return
    sizes = task_sizes(classes, tasks)
    assert (sum(sizes), len(sizes)) == (classes, tasks)
    assert max(sizes) - min(sizes) <= 1
    assert list(sizes) == sorted(sizes, reverse=True)


@given(st.lists(st.integers(0, 7), min_size=1, max_size=120), st.floats(0, 0.95), seeds)
@settings(deadline=None)
def test_train_and_held_out_images_are_disjoint_and_complete(labels: list[int], validation: float, seed: int) -> None:
    sources = torch.tensor([*labels, 7])  # classes 0 .. 5 are learned, in another order; 6 and 7 are left out
    stream = Stream(sources, sources, [3, 1, 5, 0, 2, 4], (3, 2, 1), validation, seed)
    seen = []
    for task in stream.tasks:
        train, held = stream.train(task).tolist(), stream.validation(task).tolist()
        members = [i for i, label in enumerate(sources.tolist()) if label in [3, 1, 5, 0, 2, 4][task.old : task.seen]]
        assert sorted(train + held) == stream.test(task).tolist() == members
        assert sorted(torch.cat(stream.by_class(task)).tolist()) == train
        for label, images in enumerate(stream.by_class(task), task.old):
            of_class = stream.targets == label
            assert set(stream.targets[images].tolist()) <= {label}
            assert of_class.sum() - len(images) == round(int(of_class.sum()) * validation)
        seen += train + held
    assert len(seen) == len(set(seen)) == (stream.targets >= 0).sum()


def test_held_out_choice_depends_on_the_seed_alone() -> None:
    labels = torch.arange(6).repeat(20)

    def chosen(seed: int) -> list[int]:
        return split_of(labels, validation=0.2, seed=seed).validation(split_of(labels).tasks[0]).tolist()

    assert chosen(1) == chosen(1) != chosen(2)


@given(st.integers(1, 12), st.integers(1, 12), seeds)
@settings(max_examples=30, deadline=None)
def test_a_smaller_subset_is_part_of_a_larger_one(one: int, other: int, seed: int) -> None:
    labels = torch.arange(6).repeat(10)
    small, large = (split_of(labels, train_per_class=count, seed=seed) for count in sorted((one, other)))
    for task in small.tasks:
        assert set(small.train(task).tolist()) <= set(large.train(task).tolist())
        assert [len(images) for images in small.by_class(task)] == [min(10, one, other)] * 2
        assert small.test(task).tolist() == large.test(task).tolist()


# An epoch of passes


@given(st.integers(1, 90), st.integers(1, 40), st.integers(1, 12), st.integers(1, 8), seeds)
@settings(max_examples=60, deadline=None)
def test_passes(current: int, past: int, rows_current: int, rows_past: int, seed: int) -> None:
    plans = [mixed(current, past, PASSES, epoch, seed, (rows_current, rows_past)) for epoch in range(4)]
    columns = torch.cat([plan.indices for plan in plans])
    for pool, rows in (
        (range(current), slice(0, rows_current)),
        (range(current, current + past), slice(rows_current, None)),
    ):
        drawn = columns[:, rows].reshape(-1)
        for one_pass in drawn.split(len(pool)):
            assert set(one_pass.tolist()) <= set(pool)  # rows hold what they say: current first, nothing in both parts
            assert len(one_pass.unique()) == len(one_pass)  # a pass meets no image twice
    for plan in plans:
        assert plan.steps == -(-current // rows_current)
        assert plan.indices.shape[1] == plan.composition.rows == rows_current + rows_past
        assert plan.draws.unique().numel() == plan.draws.numel()  # every row has a crop of its own
    first_epoch = plans[0].indices[:, :rows_current]
    assert set(first_epoch.reshape(-1).tolist()) == set(range(current))


def test_what_a_pass_leaves_over_opens_the_next_epoch() -> None:
    current = torch.cat([mixed(100, 20, PASSES, epoch).indices[:, :48].reshape(-1) for epoch in range(2)])
    assert sorted(current[:100].tolist()) == sorted(current[100:200].tolist()) == list(range(100))
    assert current[:100].tolist() != current[100:200].tolist()


def test_steps_of_a_cifar_epoch() -> None:
    assert mixed(5000, 2000, PASSES).steps == 105
    first = RowSource(torch.arange(5000), 64, "mixed")
    assert plan_epoch([first], Composition(64, 0, 0), PASSES, 0, (0, 0), 0).steps == 79


@pytest.mark.parametrize("protocol", [PASSES, CYCLE], ids=["passes", "cycle"])
def test_an_epoch_is_a_function_of_seed_position_and_number(protocol: Protocol) -> None:
    def rows(seed: int = 0, epoch: int = 0, position: tuple[int, int] = (3, 0)) -> list[list[int]]:
        parts = [RowSource(torch.arange(30), 6, "current"), RowSource(torch.arange(30, 50), 2, "past")]
        return plan_epoch(parts, Composition(6, 2, 3), protocol, seed, position, epoch).indices.tolist()

    assert rows() == rows()
    assert (
        len(
            {
                str(rows(**other))
                for other in ({}, {"seed": 1}, {"epoch": 1}, {"position": (4, 0)}, {"position": (3, 1)})
            }
        )
        == 5
    )


@pytest.mark.parametrize("protocol", [PASSES, CYCLE], ids=["passes", "cycle"])
@pytest.mark.parametrize("sizes", [(0, 20), (20, 0)])
def test_an_epoch_without_a_batch_is_an_error(protocol: Protocol, sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"no batch of 64 rows can be filled from \["):
        mixed(*sizes, protocol)


# An epoch of the released code

CIFAR = [(2, 200), (3, 100), (4, 67), (5, 50), (6, 40), (7, 34), (8, 29), (9, 25), (10, 23)]
FINETUNING = dict(zip(range(2, 11), (124, 124, 124, 124, 124, 126, 125, 124, 128), strict=True))
LUCIR = dict(zip(range(2, 11), (135, 135, 134, 135, 135, 135, 135, 135, 135), strict=True))
EEIL = dict(zip(range(2, 11), (135, 135, 135, 135, 135, 136, 136, 135, 136), strict=True))
FINETUNING_IMAGENET = dict(zip(range(2, 11), (243, 243, 242, 243, 243, 242, 242, 243, 242), strict=True))
LUCIR_IMAGENET = dict(zip(range(2, 11), (285, 285, 283, 285, 285, 284, 284, 285, 284), strict=True))
EEIL_IMAGENET = dict(zip(range(2, 11), (285, 285, 285, 285, 285, 286, 286, 285, 286), strict=True))


@pytest.mark.parametrize(
    ("images", "union", "drop_last", "expected"),
    [
        pytest.param(4500, False, False, FINETUNING, id="ft"),
        pytest.param(4500, True, False, LUCIR, id="lucir"),
        pytest.param(4500, True, True, EEIL, id="eeil"),
        pytest.param(11700, False, False, FINETUNING_IMAGENET, id="ft-imagenet"),
        pytest.param(11700, True, False, LUCIR_IMAGENET, id="lucir-imagenet"),
        pytest.param(11700, True, True, EEIL_IMAGENET, id="eeil-imagenet"),
    ],
)
def test_steps_of_a_released_epoch(images: int, union: bool, drop_last: bool, expected: dict[int, int]) -> None:
    protocol = Protocol(epoch="cycle", drop_last=drop_last)
    for task, each in CIFAR:
        assert each == per_class(2000, 10 * (task - 1), "ceil")
        memory = torch.arange(images, images + each * 10 * (task - 1))
        current = torch.arange(images + len(memory)) if union else torch.arange(images)
        parts = [RowSource(current, 48, "current"), RowSource(memory, 16, "past")]
        assert (
            plan_epoch(parts, Composition(48, 16, task - 1), protocol, 0, (task - 1, 0), 0).steps == expected[task]
        ), task


SECOND = dict(zip(range(2, 11), (177, 177, 177, 177, 177, 178, 178, 177, 180), strict=True))
SECOND_IMAGENET = dict(zip(range(2, 11), (327, 327, 327, 327, 327, 328, 328, 327, 330), strict=True))


@pytest.mark.parametrize(("images", "expected"), [(4500, SECOND), (11700, SECOND_IMAGENET)])
def test_steps_of_eeils_released_phases(images: int, expected: dict[int, int]) -> None:
    """As a run lays them out: the second phase has the memory twice among its current rows, 47 % on CIFAR-100."""
    spec = resolve("cifar100", method="eeil", protocol="released")
    main, second = load().methods["eeil"].build(**spec.method_options).phases(Task(1, (10, 10)))
    first_phase = {4500: EEIL, 11700: EEIL_IMAGENET}[images]
    for task, each in CIFAR:
        memory = Memory((torch.arange(images, images + each * 10 * (task - 1)),))
        parts = SimpleNamespace(stream=SimpleNamespace(train=lambda _: torch.arange(images)))
        state = SimpleNamespace(memory=memory, phase=0, pool=None)
        run: Any = SimpleNamespace(spec=spec, parts=parts, state=state)
        for phase, steps in ((main, first_phase), (second, expected)):
            state.pool = draw_phase_pool(run, Task(task - 1, (10,) * task), phase)
            plan = lay_out_epoch(run, Task(task - 1, (10,) * task), phase, 0)
            assert (plan.steps, plan.composition.past) == (steps[task], 16), (task, phase.name)
        old = (state.pool >= images).float().mean().item()
        assert old == pytest.approx(2 * len(memory) / (images + 2 * len(memory)))
        assert images != 4500 or round(100 * old) in (47, 48)


@pytest.mark.parametrize(("images", "steps"), [(4500, 70), (11700, 182)])
@pytest.mark.parametrize("drop_last", [False, True])
def test_steps_of_a_released_first_task(images: int, steps: int, drop_last: bool) -> None:
    protocol = Protocol(epoch="cycle", drop_last=drop_last)
    assert (
        plan_epoch([RowSource(torch.arange(images), 64, "mixed")], Composition(64, 0, 0), protocol, 0, (0, 0), 0).steps
        == steps
    )


def test_a_replayed_loader_repeats_its_batches_and_their_crops() -> None:
    plan = mixed(96, 40, CYCLE, rows=(12, 4))  # 8 batches of the task, 10 of the memory
    assert plan.steps == 10
    indices, draws = plan.indices, plan.draws
    assert torch.equal(indices[8:, :12], indices[:2, :12])
    assert torch.equal(draws[8:, :12], draws[:2, :12])
    assert draws[:8, :12].unique().numel() == 96  # nothing repeats before
    assert draws[:, 12:].unique().numel() == 40
    assert not set(draws[:, :12].reshape(-1).tolist()) & set(draws[:, 12:].reshape(-1).tolist())


def test_a_replayed_short_batch_is_skipped_every_time() -> None:
    plan = mixed(40, 60, CYCLE, rows=(12, 4))  # 3 full batches and one of 4 images beside 15 of the memory
    assert plan.steps == 15 - 3
    assert mixed(40, 60, dataclasses.replace(CYCLE, drop_last=True), rows=(12, 4)).steps == 15


@given(st.integers(1, 60), st.integers(1, 60), st.booleans(), seeds)
@settings(max_examples=40, deadline=None)
def test_rows_of_a_released_epoch_are_ordered(current: int, past: int, drop_last: bool, seed: int) -> None:
    try:
        plan = mixed(current, past, dataclasses.replace(CYCLE, drop_last=drop_last), seed=seed, rows=(6, 2))
    except ValueError:
        assert current < 6 or past < 2 or not drop_last
        return
    assert (plan.indices[:, :6] < current).all()
    assert (plan.indices[:, 6:] >= current).all()
    for row in plan.indices:
        assert len(row.unique()) == 8


# The fields


def test_corrected_is_the_default_and_released_names_fields() -> None:
    assert Protocol(**PROTOCOLS["corrected"]) == Protocol()
    assert Protocol(**PROTOCOLS["released"]) == dataclasses.replace(Protocol(), **RELEASED)
    assert all(getattr(Protocol(), field) != value for field, value in RELEASED.items())


@pytest.mark.parametrize("validation", [-0.1, 1.0, float("nan")])
def test_validation_is_a_part(validation: float) -> None:
    with pytest.raises(ValueError, match="validation is a part"):
        Protocol(validation=validation)


def test_keeping_the_best_needs_held_out_images() -> None:
    with pytest.raises(ValueError, match=r"keep: best needs held-out images; set protocol\.validation"):
        Protocol(keep="best")


def test_corrected_is_called_our_reading_and_never_the_papers_text() -> None:
    text = {
        path: path.read_text(encoding="utf-8")
        for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("cilnorm/**/*.py"))
    }
    for path, content in text.items():
        assert not re.search(r"paper\s+as\s+it\s+is\s+written|corrected \(the paper\)", content), path
    assert all(
        "our reading of the paper" in " ".join(text[ROOT / name].split())
        for name in ("README.md", "cilnorm/training/protocol.py")
    )


# Tasks of other sizes


@pytest.mark.parametrize(
    ("tasks", "first", "increment", "expected"),
    [
        (6, 50, None, (50, *(10,) * 5)),  # B50-10
        (11, 50, None, (50, *(5,) * 10)),  # B50-5
        (10, 50, 10, (50, *(10,) * 5)),
        (10, 50, 5, (50, *(5,) * 10)),
        (10, 50, 25, (50, 25, 25)),
        (10, None, 5, (5,) * 20),  # B0-20 in the terms of steps
        (10, None, 10, (10,) * 10),
        (10, None, 20, (20,) * 5),
        (10, None, 30, (30, 30, 30, 10)),  # the last one brings what is left
        (10, 50, 30, (50, 30, 20)),
        (10, 100, 10, (100,)),
        (1, 100, None, (100,)),
    ],
)
def test_tasks_of_the_usual_protocols(
    tasks: int, first: int | None, increment: int | None, expected: tuple[int, ...]
) -> None:
    assert task_sizes(100, tasks, first, increment) == expected


@given(st.integers(1, 200), st.integers(1, 30), st.integers(1, 210), st.integers(1, 60))
def test_task_sizes_with_a_larger_first_task_hold_every_class(
    classes: int, tasks: int, first: int, increment: int
) -> None:
    if first > classes:
        with pytest.raises(ValueError, match=f"a first task of {first} classes, but {classes} in all"):
            task_sizes(classes, tasks, first, increment)
        return
    stepped = task_sizes(classes, tasks, first, increment)
    assert sum(stepped) == classes
    assert stepped[0] == first
    assert all(size == increment for size in stepped[1:-1])
    if tasks > 1 and classes - first >= tasks - 1:
        shared = task_sizes(classes, tasks, first)
        assert (sum(shared), len(shared), shared[0]) == (classes, tasks, first)
        assert max(shared[1:]) - min(shared[1:]) <= 1
    elif tasks <= classes and not (tasks == 1 and first == classes):
        with pytest.raises(ValueError, match=f"a first task of {first} leaves {classes - first} of {classes} classes"):
            task_sizes(classes, tasks, first)


def test_class_order_1993_is_the_permutation_that_the_field_uses() -> None:
    order = class_order(100, 1993)
    assert order[:12] == [68, 56, 78, 8, 23, 84, 90, 65, 74, 76, 40, 89]
    assert order == np.random.RandomState(1993).permutation(100).tolist()
