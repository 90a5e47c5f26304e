"""What a checkpoint holds comes back as it was; one that is damaged, foreign or malicious is refused."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from cilnorm.batch import Composition, Task
from cilnorm.heads import Linear
from cilnorm.method import Past, Phase, Schedule
from cilnorm.network import Network
from cilnorm.storage.checkpoint import CheckpointError, Checkpoints, RunState
from cilnorm.storage.tensor_file import tensor_file
from cilnorm.training.engine import Engine
from cilnorm.training.memory import Memory
from cilnorm.training.stored import Stored
from tests.fake import Tiny, TwoPhases

TASKS = tuple(Task(index, (2, 2, 2)) for index in range(3))


def network(tasks: int) -> Network:
    """A fresh network that knows some tasks."""
    net = Network(Tiny(nn.BatchNorm2d), Linear(Tiny.dim))
    for task in TASKS[:tasks]:
        net.head.grow(task.new)
    return net


def of(folder: Path, spec: str = "key") -> Checkpoints:
    return Checkpoints(folder, {"spec": spec, "images": "digest"})


def read(folder: Path, net: Network, spec: str = "key") -> RunState:
    """The state of the newest checkpoint, which is sound."""
    state, warning = of(folder, spec).read(net, TASKS)
    assert warning == ""
    return state


def midway() -> tuple[RunState, Network, Engine]:
    """In the second phase of the third task, with everything that a state may hold."""
    net = network(3)
    past = Past(network(2).eval().requires_grad_(False), {"scale": torch.tensor(2.5)})
    engine = Engine(net, TwoPhases(), TASKS[2], Phase(), Schedule(momentum=0.9), past)
    net(torch.rand(4, 3, 8, 8)).logits.sum().backward()
    engine.optimizer.step()
    state = RunState(
        task=2, phase=1, epoch=3, step=5, memory=Memory((torch.tensor([4, 2]), torch.tensor([9]))), past=past,
        matrix=[[91.0], [82.5, 73.25]], steps=77, seconds=1.5, logged=99, best=(0.25, copy.deepcopy(net.state_dict())),
        pool=torch.tensor([3, 1]), sums={"ce": torch.tensor(1.25)},
    )  # fmt: skip
    state.stored = Stored(torch.tensor([4, 2, 9]), {"logits": torch.rand(3, 6)})
    return state, net, engine


def same(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_everything_comes_back(tmp_path: Path) -> None:
    state, net, engine = midway()
    of(tmp_path).write(state, net, engine)
    fresh = network(0)
    found = read(tmp_path, fresh)
    assert same(fresh, net)
    assert (found.task, found.phase, found.epoch, found.step) == (2, 1, 3, 5)
    assert (found.steps, found.seconds, found.logged, found.sums) == (77, 1.5, 99, {"ce": torch.tensor(1.25)})
    assert found.matrix == state.matrix
    assert [kept.tolist() for kept in found.memory.exemplars] == [[4, 2], [9]]
    assert found.stored.indices.tolist() == [4, 2, 9]
    assert torch.equal(found.stored.tensors["logits"], state.stored.tensors["logits"])
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
    of(tmp_path).write(RunState(task=2), net, None)
    fresh = network(0)
    found = read(tmp_path, fresh)
    assert not found.midway
    assert len(fresh.head.blocks) == 2
    assert (found.past, found.best, found.pool, found.optimizer) == (None, None, None, None)


@pytest.mark.parametrize("position", ["phase", "epoch", "step"])
def test_midway(position: str) -> None:
    assert not RunState(task=1).midway
    assert RunState(**{position: 1}).midway


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def write_two(folder: Path) -> None:
    for task in (1, 2):
        of(folder).write(RunState(task=task), network(task), None)


@pytest.mark.parametrize(
    "damage", [lambda path: flip(path, 700), lambda path: flip(path, -1), lambda p: p.write_bytes(b"")]
)
def test_a_damaged_newest_one_gives_way_to_the_one_before(damage: Callable[[Path], None], tmp_path: Path) -> None:
    write_two(tmp_path)
    damage(tmp_path / "last.pt")
    net = network(0)
    state, warning = of(tmp_path).read(net, TASKS)
    assert (state.task, len(net.head.blocks)) == (1, 1)
    assert "last.pt can't be read: its checksum is missing or differs; going on from" in warning
    assert sorted(os.listdir(tmp_path)) == ["damaged.pt", "previous.pt"]
    of(tmp_path).write(RunState(task=2), network(2), None)
    assert read(tmp_path, network(0)).task == 2
    assert of(tmp_path).previous.exists()


def test_both_damaged(tmp_path: Path) -> None:
    write_two(tmp_path)
    for name in ("last.pt", "previous.pt"):
        flip(tmp_path / name, 900)
    with pytest.raises(CheckpointError, match=r"last\.pt can't be read: .*; nor can the one before it: ") as caught:
        read(tmp_path, network(0))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04"])
def test_the_only_one_damaged(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"last\.pt can't be read: .*; there is none before it, so only --overwrite"
    ):
        read(tmp_path, network(0))


def test_killed_between_the_two_renames(tmp_path: Path) -> None:
    write_two(tmp_path)
    os.replace(tmp_path / "last.pt", tmp_path / "previous.pt")
    assert read(tmp_path, network(0)).task == 2


def test_none_yet_is_the_start(tmp_path: Path) -> None:
    assert read(tmp_path, network(0)).midway is False


def test_a_checkpoint_of_another_run_format_or_network(tmp_path: Path) -> None:
    of(tmp_path).write(RunState(task=2), network(2), None)
    with pytest.raises(CheckpointError, match="belongs to another run: its spec is key, not other"):
        read(tmp_path, network(0), "other")
    with pytest.raises(CheckpointError, match="its images is digest, not new"):
        Checkpoints(tmp_path, {"images": "new"}).read(network(0), TASKS)
    with pytest.raises(CheckpointError, match="does not fit the run"):
        read(tmp_path, network(1))
    content = torch.load(tmp_path / "last.pt", weights_only=True)
    (tmp_path / "last.pt").write_bytes(tensor_file({**content, "format": 0}))
    with pytest.raises(CheckpointError, match=r"written in format 0; this version of cilnorm reads \d"):
        read(tmp_path, network(0))


@pytest.mark.parametrize("position", [[0, 0, 0], [4, 0, 0, 0], [-1, 0, 0, 0], ["1", 0, 0, 0], None])
def test_a_position_that_is_none(position: object, tmp_path: Path) -> None:
    of(tmp_path).write(RunState(task=2), network(2), None)
    content = torch.load(tmp_path / "last.pt", weights_only=True)
    (tmp_path / "last.pt").write_bytes(tensor_file({**content, "position": position}))
    with pytest.raises(CheckpointError, match="does not fit the run"):
        read(tmp_path, network(0))


def test_what_layers_were_told_is_no_part_of_it(tmp_path: Path) -> None:
    state, net, engine = midway()
    net.observe(Composition(3, 1, 2))
    of(tmp_path).write(state, net, engine)
    fresh = network(0)
    read(tmp_path, fresh)
    assert fresh._composition is None
