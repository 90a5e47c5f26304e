"""Images that one phase of a task leaves to another: as many of every class, the same in both, others in each task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cilnorm.experiment import feeding, runner
from cilnorm.registry import Registry
from cilnorm.spec import Spec, SpecError
from cilnorm.training.epoch_plan import EpochPlan
from cilnorm.training.held_out import hold_out
from cilnorm.training.randomness import generator

Tiny = Callable[..., Spec]


def test_as_many_of_every_class_are_held_out() -> None:
    new, exemplars = [torch.arange(100, 150), torch.arange(200, 230)], [torch.arange(20), torch.arange(30, 55)]
    for part, count in ((0.1, 2), (0.25, 5), (0.01, 1)):
        current, past, held = hold_out(new, exemplars, part, generator(0, "held out", 1))
        assert torch.cat([current, past, held]).sort().values.tolist() == torch.cat([*exemplars, *new]).tolist()
        assert [sum(int(index) in members.tolist() for index in held) for members in (*exemplars, *new)] == [count] * 4
        assert current.min() >= 100 > past.max()
        assert torch.equal(held, hold_out(new, exemplars, part, generator(0, "held out", 1))[2])
    assert not torch.equal(held, hold_out(new, exemplars, part, generator(0, "held out", 2))[2])


def test_what_the_main_phase_leaves_out_is_what_the_correction_learns_from(
    tiny: Tiny, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[EpochPlan] = []

    def planned(*arguments: Any) -> EpochPlan:
        plans.append(plan(*arguments))
        return plans[-1]

    plan = feeding.plan_epoch
    monkeypatch.setattr(feeding, "plan_epoch", planned)
    spec = tiny(method="bic", norm="tbbn", memory=48)
    runner.run(spec, tmp_path / "run", device="cpu", registry=registry)
    targets = torch.arange(6).repeat(24)  # of the fake data set, in its own order of labels
    used = [set(each.indices.flatten().tolist()) for each in plans]
    assert len(used) == 2 + 4 + 4  # two epochs a phase
    for task, first in ((1, 2), (2, 6)):
        main, held = used[first] | used[first + 1], used[first + 2] | used[first + 3]
        assert not main & held
        count = max(1, int(0.1 * (48 // (2 * task))))
        assert torch.bincount(targets[list(held)]).tolist().count(count) == 2 * (task + 1)
        assert {each.composition.past for each in plans[first : first + 4]} == {4, 0}
    assert used[4] != used[8]


def test_a_memory_of_one_image_a_class_has_nothing_to_hold_out(tiny: Tiny, registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="task 2, phase main: no batch of 16 rows can be filled"):
        runner.run(tiny(method="bic", memory=6, stop_after=2, classes=6, tasks=3, rows=[12, 4], train_per_class=1),
                   tmp_path / "run", device="cpu", registry=registry)  # fmt: skip
