"""ResNets for small images against numbers that the released network gives with the same weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cilnorm.hookspecs import Backbone
from cilnorm.registry import load
from tests import golden as gold

BACKBONES = load().backbones
GOLDEN = gold.Golden("backbones")


def hashed(count: int, position: int, seed: int) -> Tensor:
    """``count`` numbers in [0, 1) that stand for the ``position``-th tensor; the formula of the golden files."""
    wrap = 2**32
    h = (2654435761 * np.arange(count, dtype=np.uint64) + 97531 * position + 31337 * seed + 12345) % wrap
    h ^= h >> 15
    h = h * 2246822519 % wrap
    h ^= h >> 13
    h = h * 3266489917 % wrap
    h ^= h >> 16
    return torch.from_numpy(h.astype(np.float64) / wrap)


def fill(net: nn.Module, listed: list[str]) -> None:
    """Gives every tensor the values that its place in the list stands for."""
    state = {name: tensor for name, tensor in net.state_dict().items() if not name.endswith("num_batches_tracked")}
    assert [f"{name}:{'x'.join(map(str, tensor.shape))}" for name, tensor in state.items()] == listed
    for position, (name, tensor) in enumerate(state.items()):
        u = hashed(tensor.numel(), position, GOLDEN.meta["seed"]).view(tensor.shape)
        if tensor.dim() == 4:
            u = (2 * u - 1) * np.sqrt(6 / tensor[0].numel())
        elif name.endswith("running_mean"):
            u = 0.2 * u - 0.1
        elif name.endswith("bias"):
            u = 0.4 * u - 0.2
        else:
            u = 0.8 + 0.4 * u
        tensor.copy_(u)


@pytest.fixture
def resnet32() -> Callable[..., nn.Module]:
    def make(signed_embedding: bool = False) -> nn.Module:
        net = BACKBONES["resnet32"].build(nn.BatchNorm2d, signed_embedding=signed_embedding).double()
        fill(net, GOLDEN.meta["tensors"]["resnet32"])
        return net

    return make


@pytest.fixture
def images() -> Tensor:
    return 2 * hashed(3 * 3 * 32 * 32, 999, GOLDEN.meta["seed"]).view(3, 3, 32, 32) - 1


def same(actual: Tensor, key: str) -> None:
    gold.check(actual, GOLDEN.tensor(key, torch.float64), 1e-9, key)


@torch.no_grad()
def test_evaluation(resnet32: Callable[..., nn.Module], images: Tensor) -> None:
    net = resnet32().eval()
    embedding, maps = net(images)
    same(embedding, "resnet32_eval_features")
    # The released means are those after a ReLU; our maps are taken before it.
    same(F.relu(net.bn1(net.conv1(images))).mean((0, 2, 3)), "resnet32_eval_bn1_channel_mean")
    for number, stage in enumerate(maps, 1):
        assert (stage < 0).any()
        same(F.relu(stage).mean((0, 2, 3)), f"resnet32_eval_layer{number}_channel_mean")


@torch.no_grad()
def test_training(resnet32: Callable[..., nn.Module], images: Tensor) -> None:
    net = resnet32().train()
    embedding, _ = net(images)
    same(embedding, "resnet32_train_features")
    same(net.bn1.running_var, "resnet32_train_bn1_running_var_after")


@torch.no_grad()
def test_signed_embedding(resnet32: Callable[..., nn.Module], images: Tensor) -> None:
    embedding, maps = resnet32(signed_embedding=True).eval()(images)
    same(embedding, "resnet32_norelu_eval_features")
    assert torch.equal(embedding, maps[-1].mean((2, 3)))


def test_parameters_are_counted_as_in_the_released_network() -> None:
    net = BACKBONES["resnet32"].build(nn.BatchNorm2d)
    assert sum(p.numel() for p in net.parameters()) == GOLDEN.meta["parameter_count_without_head"]["resnet32"]
    assert sum(isinstance(module, nn.BatchNorm2d) for module in net.modules()) == 33


@pytest.mark.parametrize("record", [r for n, r in BACKBONES.items() if n.startswith("resnet") and n[6:].isdigit()])
def test_depth_shapes_and_gradients(record: Backbone) -> None:
    net = record.build(nn.BatchNorm2d)
    if getattr(net, "dim", None) != 64:
        pytest.skip("another family")
    depth = int(record.name.removeprefix("resnet"))
    three_by_three = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(three_by_three) + 1 == depth  # the classifier is the last layer
    if depth > 20:
        return
    embedding, maps = net(torch.rand(2, 3, 32, 32))
    assert embedding.shape == (2, 64)
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    embedding.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_initial_weights() -> None:
    """Kaiming normal over the fan out; no branch starts at zero."""
    torch.manual_seed(0)
    net = BACKBONES["resnet32"].build(nn.BatchNorm2d)
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
