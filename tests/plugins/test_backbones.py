"""Every backbone with recorded outputs against them, all backbones against what the door promises of one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cilnorm.hookspecs import Backbone
from cilnorm.registry import Registry, load
from tests.golden import Golden, check

EXACT = 1e-9
SMALL = [*(f"resnet{depth}" for depth in (8, 14, 20, 32, 44, 56)), "resnet32-a"]
NEW = ["resnet18", "resnet50", "resnet18-podnet", "resnet32-rebuffi", "timm-resnet18"]


SHELF = load().backbones


def hashed(count: int, k: int, seed: int) -> np.ndarray:
    """u in [0, 1): the formula that fills tensor ``k`` of a recorded network."""
    mask = np.uint64(2**32 - 1)
    h = (np.arange(count, dtype=np.uint64) * np.uint64(2654435761) + np.uint64(97531 * k + 31337 * seed + 12345)) & mask
    h ^= h >> np.uint64(15)
    h = (h * np.uint64(2246822519)) & mask
    h ^= h >> np.uint64(13)
    h = (h * np.uint64(3266489917)) & mask
    h ^= h >> np.uint64(16)
    return h.astype(np.float64) / 2**32


def fill(backbone: nn.Module, listed: list[str], seed: int) -> None:
    """Gives the tensors of ``backbone``, in their order, the recorded values."""
    state = {name: tensor for name, tensor in backbone.state_dict().items() if not name.endswith("num_batches_tracked")}
    assert len(state) == len(listed)
    filled = {}
    for k, ((name, tensor), entry) in enumerate(zip(state.items(), listed, strict=True)):
        known, _, shape = entry.partition(":")
        assert tuple(tensor.shape) == tuple(map(int, shape.split("x"))), (name, entry)
        u = torch.from_numpy(hashed(tensor.numel(), k, seed)).view(tensor.shape)
        kind = known.rpartition(".")[2]
        if tensor.dim() == 4:
            filled[name] = (2 * u - 1) * (6 / tensor[0].numel()) ** 0.5
        else:
            filled[name] = {"bias": 0.4 * u - 0.2, "running_mean": 0.2 * u - 0.1}.get(kind, 0.8 + 0.4 * u)
    backbone.load_state_dict(filled, strict=False)


def images(count: int, size: int, seed: int) -> Tensor:
    return torch.from_numpy(2 * hashed(count * 3 * size * size, 999, seed) - 1).view(count, 3, size, size)


Build = Callable[..., nn.Module]


@pytest.fixture
def recorded(registry: Registry) -> Build:
    """Builds a backbone in float64 with the recorded weights of a network."""

    def build(network: str, name: str, norm: str = "bn", *, signed: bool = False, **options: object) -> nn.Module:
        golden = Golden("backbones")
        layer = partial(registry.norms[norm].build, **options)
        backbone = registry.backbones[name].build(layer, signed_embedding=signed).double()
        assert sum(parameter.numel() for parameter in backbone.parameters()) == golden.meta[
            "parameter_count_without_head"
        ].get(network, 0), network
        fill(backbone, golden.meta["tensors"][network], golden.meta["seed"])
        return backbone.eval()

    return build


def held(value: Tensor, key: str) -> None:
    check(value, Golden("backbones").tensor(key, torch.float64), EXACT, key)


@torch.no_grad()
def test_resnet32(recorded: Build) -> None:
    golden = Golden("backbones")
    x = images(3, 32, golden.meta["seed"])
    net = recorded("resnet32", "resnet32")
    embedding, maps = net(x)
    held(embedding, "resnet32_eval_features")
    held(net.bn1(net.conv1(x)).relu().mean((0, 2, 3)), "resnet32_eval_bn1_channel_mean")  # its ReLU is in place
    for number, signed in enumerate(maps, 1):
        held(signed.relu().mean((0, 2, 3)), f"resnet32_eval_layer{number}_channel_mean")
    held(recorded("resnet32", "resnet32", signed=True)(x)[0], "resnet32_norelu_eval_features")
    held(net.train()(x)[0], "resnet32_train_features")
    held(net.bn1.running_var, "resnet32_train_bn1_running_var_after")


@torch.no_grad()
def test_resnet32_without_weights_in_its_shortcuts() -> None:
    """PyCIL's, which has 31 norms."""
    golden = Golden("backbone_resnet32_option_a_0")
    net = SHELF["resnet32-a"].build(nn.BatchNorm2d).double()
    assert sum(parameter.numel() for parameter in net.parameters()) == golden.meta["parameters_without_head"] == 463504
    assert sum(isinstance(module, nn.BatchNorm2d) for module in net.modules()) == 31
    fill(net, golden.meta["tensors"], golden.meta["seed"])
    x = images(3, 32, golden.meta["seed"])
    embedding, maps = net.eval()(x)
    found = {"eval_features": embedding}
    found |= {f"stage{number}_channel_mean": each.relu().mean((0, 2, 3)) for number, each in enumerate(maps, 1)}
    found |= {"train_features": net.train()(x)[0], "train_bn1_running_var_after": net.bn1.running_var}
    for key, value in found.items():
        check(value, golden.tensor(key, torch.float64), EXACT, key)


@torch.no_grad()
def test_resnet32_with_other_norms(recorded: Build) -> None:
    x = images(3, 32, Golden("backbones").meta["seed"])
    held(recorded("resnet32", "resnet32", "cn", groups=8)(x)[0], "resnet32_cn8_eval_features")
    without = recorded("resnet32_gn16", "resnet32", "gn", channels_per_group=16, affine=False)
    held(without(x)[0], "resnet32_gn16_features")


@pytest.mark.parametrize("name", ["resnet18", "timm-resnet18"])
@torch.no_grad()
def test_resnet18(recorded: Build, name: str) -> None:
    x = images(2, 64, Golden("backbones").meta["seed"])
    held(recorded("resnet18", name)(x)[0], "resnet18_eval_features")


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
@torch.no_grad()
def test_weights_of_torchvision_fit_by_name(name: str) -> None:
    """And give the same embedding; the small stem has no counterpart there."""
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    theirs = getattr(models, name)().eval().double()
    theirs.fc = nn.Identity()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.05)
    ours = SHELF[name].build(nn.BatchNorm2d).eval().double()
    ours.load_state_dict(theirs.state_dict())
    x = images(2, 64, 0)
    torch.testing.assert_close(ours(x)[0], theirs(x))
    assert ours.dim == theirs(x).shape[1]
    small = SHELF[name].build(nn.BatchNorm2d, stem=(3, 1), pool=False)
    assert [each.shape[-1] for each in small(torch.zeros(1, 3, 32, 32))[1]] == [32, 16, 8, 4]
    assert [each.shape[-1] for each in small.eval()(torch.zeros(1, 3, 64, 64))[1]] == [64, 32, 16, 8]


@torch.no_grad()
def test_rebuffi(recorded: Build) -> None:
    golden = Golden("backbones")
    x = images(3, 32, golden.meta["seed"])
    held(recorded("rebuffi", "resnet32-rebuffi")(x)[0], "rebuffi_eval_features")
    embedding, maps = recorded("rebuffi", "resnet32-rebuffi", signed=True)(x)
    held(embedding, "rebuffi_eval_raw_features")
    for stage, each in enumerate(maps):
        assert tuple(each.shape) == tuple(golden.arrays[f"rebuffi_attention{stage}_shape"])
        held(each.mean((0, 2, 3)), f"rebuffi_attention{stage}_channel_mean")


@torch.no_grad()
def test_resnet18_of_podnet(recorded: Build) -> None:
    golden = Golden("backbones")
    x = images(2, 64, golden.meta["seed"])
    embedding, maps = recorded("podnet_resnet18", "resnet18-podnet", signed=True)(x)
    held(embedding, "podnet_resnet18_raw_features")
    for stage, each in enumerate(maps):
        assert tuple(each.shape) == tuple(golden.arrays[f"podnet_resnet18_attention{stage}_shape"])
        held(each.mean((0, 2, 3)), f"podnet_resnet18_attention{stage}_channel_mean")


@pytest.mark.parametrize("name", NEW)
def test_the_signed_embedding_leaves_out_the_last_relu(registry: Registry, name: str) -> None:
    """Of the last stage, on every network; the released code for LUCIR takes the third's on a ResNet-18."""
    norm = registry.norms["bn"].build
    torch.manual_seed(0)
    plain = registry.backbones[name].build(norm).eval()
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.1)  # some residual branches start at zero
    signed = registry.backbones[name].build(norm, signed_embedding=True).eval()
    signed.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        (of_plain, plain_maps), (of_signed, signed_maps) = plain(x), signed(x)
    for a, b in zip(plain_maps, signed_maps, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(of_plain, plain_maps[-1].relu().mean((2, 3)))
    torch.testing.assert_close(of_signed, plain_maps[-1].mean((2, 3)))
    assert of_signed.min() < 0 <= of_plain.min()


@pytest.mark.parametrize("name", SMALL + NEW)
def test_maps_widen_from_shallow_to_deep(registry: Registry, name: str) -> None:
    """Beside what the kit holds backbones to; whatever the norm, and of images twice as large."""
    backbone = registry.backbones[name].build(partial(nn.InstanceNorm2d, affine=True), signed_embedding=True)
    with torch.no_grad():
        embedding, maps = backbone(torch.randn(2, 3, 64, 64))
    assert embedding.shape == (2, backbone.dim)
    widths = [each.shape[1] for each in maps]
    assert widths == sorted(widths)
    assert len(maps) >= 3


@pytest.mark.parametrize("name", ["resnet18-podnet", "resnet32-rebuffi"])
def test_residual_branches_start_at_zero_if_the_norm_has_a_scale(registry: Registry, name: str) -> None:
    build = registry.backbones[name].build
    backbone = build(nn.BatchNorm2d)
    seconds = [module for key, module in backbone.named_modules() if key.endswith(("bn2", "bn_b"))]
    assert seconds
    assert all(module.weight.abs().max() == 0 for module in seconds)
    build(partial(nn.BatchNorm2d, affine=False))  # nothing to start


@pytest.mark.parametrize("record", [r for n, r in SHELF.items() if n.startswith("resnet") and n[6:].isdigit()])
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


class Squashed(nn.BatchNorm2d):
    """A stranger's norm whose backward pass reads what it returned."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x))


@pytest.mark.parametrize("name", ["resnet8", "resnet18-podnet", "resnet32-rebuffi"])
def test_nothing_writes_over_what_a_norm_returned(registry: Registry, name: str) -> None:
    net = registry.backbones[name].build(Squashed)
    net(torch.randn(2, 3, 32, 32))[0].sum().backward()


def test_initial_weights() -> None:
    """Kaiming normal over the fan out; no branch starts at zero."""
    torch.manual_seed(0)
    net = SHELF["resnet32"].build(nn.BatchNorm2d)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in net.modules()) == 33
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
