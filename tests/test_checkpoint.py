"""What a checkpoint holds comes back as it was; one that is damaged, foreign or malicious is refused."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from cilnorm.batch import Composition, Task
from cilnorm.checkpoint import CheckpointError, State, read_checkpoint, write_checkpoint
from cilnorm.engine import Engine
from cilnorm.heads import Linear
from cilnorm.memory import Memory
from cilnorm.method import Past, Phase, Schedule
from cilnorm.network import Network
from tests.fake import Tiny, TwoPhases

TASKS = tuple(Task(index, (2, 2, 2)) for index in range(3))


def network(tasks: int) -> Network:
    """A fresh network that knows some tasks."""
    net = Network(Tiny(nn.BatchNorm2d), Linear(Tiny.dim))
    for task in TASKS[:tasks]:
        net.head.grow(task.new)
    return net


def midway() -> tuple[State, Network, Engine]:
    """In the second phase of the third task, with everything that a state may hold."""
    net = network(3)
    past = Past(network(2).eval().requires_grad_(False), {"scale": torch.tensor(2.5)})
    engine = Engine(net, TwoPhases(), TASKS[2], Phase(), Schedule(momentum=0.9), past)
    net(torch.rand(4, 3, 8, 8)).logits.sum().backward()
    engine.optimizer.step()
    state = State(
        task=2, phase=1, epoch=3, memory=Memory((torch.tensor([4, 2]), torch.tensor([9]))), past=past,
        matrix=[[91.0], [82.5, 73.25]], steps=77, seconds=1.5, best=(0.25, copy.deepcopy(net.state_dict())),
        pool=torch.tensor([3, 1]),
    )  # fmt: skip
    return state, net, engine


def same(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_everything_comes_back(tmp_path: Path) -> None:
    state, net, engine = midway()
    write_checkpoint(tmp_path / "last.pt", "key", state, net, engine)
    fresh = network(0)
    found = read_checkpoint(tmp_path / "last.pt", "key", fresh, TASKS)
    assert same(fresh, net)
    assert (found.task, found.phase, found.epoch, found.steps, found.seconds) == (2, 1, 3, 77, 1.5)
    assert found.matrix == state.matrix
    assert [kept.tolist() for kept in found.memory.exemplars] == [[4, 2], [9]]
    assert found.pool is not None
    assert found.pool.tolist() == [3, 1]
    assert found.past is not None
    assert state.past is not None
    assert same(found.past.net, state.past.net)
    assert found.past.tensors["scale"] == 2.5
    assert not found.past.net.training
    assert not any(parameter.requires_grad for parameter in found.past.net.parameters())
    assert all(parameter.requires_grad for parameter in fresh.parameters())
    assert found.best is not None
    assert found.best[0] == 0.25
    assert all(torch.equal(found.best[1][name], tensor) for name, tensor in net.state_dict().items())
    again = Engine(fresh, TwoPhases(), TASKS[2], Phase(), Schedule(momentum=0.9), found.past)
    assert found.optimizer is not None
    again.optimizer.load_state_dict(found.optimizer)
    for mine, theirs in zip(engine.optimizer.state.values(), again.optimizer.state.values(), strict=True):
        assert torch.equal(mine["momentum_buffer"], theirs["momentum_buffer"])


def test_between_tasks_the_next_one_is_not_begun(tmp_path: Path) -> None:
    net = network(2)
    write_checkpoint(tmp_path / "last.pt", "key", State(task=2), net, None)
    fresh = network(0)
    found = read_checkpoint(tmp_path / "last.pt", "key", fresh, TASKS)
    assert not found.midway
    assert len(fresh.head.blocks) == 2
    assert (found.past, found.best, found.pool, found.optimizer) == (None, None, None, None)


@pytest.mark.parametrize(("phase", "epoch", "expected"), [(0, 0, False), (0, 1, True), (1, 0, True)])
def test_midway(phase: int, epoch: int, expected: bool) -> None:
    assert State(phase=phase, epoch=epoch).midway is expected


class Malice:
    """Runs something when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.target),)


def test_a_checkpoint_can_not_run_code(tmp_path: Path) -> None:
    target = tmp_path / "made by malice"
    torch.save({"format": 1, "key": "key", "net": Malice(target)}, tmp_path / "last.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Malice(target), protocol=2))
    for name in ("last.pt", "plain.pt"):
        with pytest.raises(CheckpointError, match=f"{name}: can't be read: "):
            read_checkpoint(tmp_path / name, "key", network(0), TASKS)
    assert not target.exists()


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04"])
def test_a_damaged_checkpoint(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"last\.pt: can't be read: ") as caught:
        read_checkpoint(path, "key", network(0), TASKS)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_run_format_or_network(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    write_checkpoint(path, "key", State(task=2), network(2), None)
    with pytest.raises(CheckpointError, match="belongs to another run"):
        read_checkpoint(path, "other", network(0), TASKS)
    with pytest.raises(CheckpointError, match="can't be read"):
        read_checkpoint(path, "key", network(1), TASKS)
    content = torch.load(path, weights_only=True)
    torch.save({**content, "format": 0}, path)
    with pytest.raises(CheckpointError, match="format 0"):
        read_checkpoint(path, "key", network(0), TASKS)


def test_what_layers_were_told_is_no_part_of_it(tmp_path: Path) -> None:
    state, net, engine = midway()
    net.observe(Composition(3, 1, 2))
    write_checkpoint(tmp_path / "last.pt", "key", state, net, engine)
    fresh = network(0)
    read_checkpoint(tmp_path / "last.pt", "key", fresh, TASKS)
    assert fresh._told is None
