"""Further norms against what the released layers themselves computed, and the two switches of running statistics."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from cilnorm import registry as registries
from cilnorm.experiment.runner import resume, run
from cilnorm.network import SelfActivating
from cilnorm.norms import convert_norms, finish_norms, norm_act_factory, norm_factory
from cilnorm.registry import Registry
from cilnorm.running import freeze_statistics, measure_statistics
from cilnorm.spec import Settings, resolve
from cilnorm.storage.checkpoint import Checkpoints
from tests.conftest import TINY
from tests.golden import FURTHER, Golden, check, load_initial_state, names, replay, replay_all

pytestmark = pytest.mark.slow

TOLERANCE = {torch.float64: {"": 1e-10}, torch.float32: {"": 2e-5}}
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def golden(name: str) -> Golden:
    return Golden(name, FURTHER)


def files(prefix: str) -> list[str]:
    found = names(prefix, FURTHER)
    assert found
    return found


@DTYPES
@pytest.mark.parametrize("name", files("nbn"))
def test_normalised_batch_norm(name: str, dtype: torch.dtype) -> None:
    recorded = golden(name)
    options = {"floor": recorded.meta["norm_eps"], **{key: recorded.meta[key] for key in ("eps", "momentum")}}
    replay_all(norm_factory("nbn", **options)(recorded.meta["shape"][1]), recorded, dtype, TOLERANCE[dtype])


def one_gamma(recorded: Golden) -> Golden:
    """The arrays of the released layer's two parts by the names of ours, which has one γ and one β for both."""
    arrays = dict(recorded.arrays)
    for key in recorded.arrays:
        if "inln_" in key:
            other, name = key.replace("inln_", "bn_"), key.replace("inln_", "")
            parts = [arrays.pop(other)] if other in arrays else []
            arrays[name] = np.concatenate([*parts, arrays.pop(key)])
    recorded.arrays = {key.replace("bn_", ""): value for key, value in arrays.items()}
    return recorded


@DTYPES
@pytest.mark.parametrize("name", files("spnorm"))
def test_stability_plasticity_norm(name: str, dtype: torch.dtype) -> None:
    recorded = one_gamma(golden(name))
    options = {key: recorded.meta[key] for key in ("eps", "momentum", "ratio")}
    layer = norm_factory("spnorm", **options)(recorded.meta["shape"][1])
    assert layer.bn_channels == recorded.meta["bn_channels"]
    replay_all(layer, recorded, dtype, TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize(
    ("norm", "name"), [("frn", n) for n in files("frn")] + [("evonorm-s0", n) for n in files("evo")]
)
def test_norms_with_an_activation_of_their_own(norm: str, name: str, dtype: torch.dtype) -> None:
    recorded = golden(name)
    options = {"groups": recorded.meta["groups"]} if "groups" in recorded.meta else {}
    build = norm_factory(norm, act=recorded.meta["apply_act"], eps=recorded.meta["eps"], **options)
    replay_all(build(recorded.meta["shape"][1]), recorded, dtype, TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("name", files("ws_gn"))
def test_group_norm_behind_standardised_weights(name: str, dtype: torch.dtype) -> None:
    recorded = golden(name)
    meta = recorded.meta
    channels = len(recorded.arrays["init_0.weight"])
    convolution = nn.Conv2d(meta["shape"][1], channels, meta["kernel"], meta["stride"], meta["padding"], bias=False)
    net = nn.Sequential(convolution, norm_factory("gn+ws", eps=meta["gn_eps"], groups=meta["groups"])(channels))
    replay_all(finish_norms(net, "gn+ws"), recorded, dtype, TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("name", files("frozen_bn"))
def test_frozen_batch_norm(name: str, dtype: torch.dtype) -> None:
    recorded = golden(name)
    layer = norm_factory("bn", eps=recorded.meta["eps"], momentum=recorded.meta["momentum"])(recorded.meta["shape"][1])
    load_initial_state(layer, recorded)
    layer.to(dtype)
    for step, frozen in enumerate(recorded.meta["frozen"]):
        layer.train()
        if frozen:
            freeze_statistics(layer)
            layer.train()
        replay(layer, recorded, f"s{step}_", dtype, TOLERANCE[dtype])
    y = layer.eval()(recorded.tensor("eval_x", dtype))
    check(y, recorded.expected("eval_y", dtype), TOLERANCE[dtype][""], "evaluation")


@DTYPES
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, norm_factory("bn")], ids=["torch", "ours"])
@pytest.mark.parametrize("name", files("precise_bn"))
def test_statistics_measured_anew(name: str, kind: type[nn.Module], dtype: torch.dtype) -> None:
    """As fvcore does; the counter counts on, and everything but the averages is as it was."""
    recorded = golden(name)
    options = {"eps": recorded.meta["eps"], "momentum": recorded.meta["momentum"]}
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), kind(4, **options), nn.ReLU(),
        nn.Conv2d(4, 5, 3, padding=1, bias=False), kind(5, **options),
    )  # fmt: skip
    load_initial_state(net, recorded)
    net.to(dtype).eval()
    net[1].train()
    before = [parameter.clone() for parameter in net.parameters()]
    measure_statistics(net, [recorded.tensor(f"b{b}_x", dtype) for b in range(recorded.meta["batches"])])
    assert [module.training for module in net] == [False, True, False, False, False]
    assert all(module.momentum == options["momentum"] for module in (net[1], net[4]))
    assert all(torch.equal(one, other) for one, other in zip(net.parameters(), before, strict=True))
    for index in (1, 4):
        assert net[index].num_batches_tracked == recorded.arrays[f"fvcore_{index}.num_batches_tracked"]
        for average in ("running_mean", "running_var"):
            key = f"fvcore_{index}.{average}"
            check(getattr(net[index], average), recorded.expected(key, dtype), TOLERANCE[dtype][""], key)
    y = net.eval()(recorded.tensor("eval_x", dtype))
    check(y, recorded.expected("fvcore_eval_y", dtype), TOLERANCE[dtype][""], "evaluation")


def backbone(name: str, norm: str, **options: Any) -> nn.Module:
    net = registries.load().backbones[name].build(norm_factory(norm, **options))
    return finish_norms(net, norm)


@pytest.mark.parametrize("norm", ["frn", "evonorm-s0"])
@pytest.mark.parametrize("name", ["resnet8", "resnet32-rebuffi", "timm-resnet18", "timm-resnet50"])
def test_our_backbones_leave_out_the_relu_that_a_norm_brings_along(name: str, norm: str) -> None:
    """Inside blocks the norm activates; before an addition it does not, and the network's own ReLU follows the sum."""
    net, plain = backbone(name, norm), backbone(name, "bn")
    activating = {path for path, module in net.named_modules() if getattr(module, "activates", False)}
    norms = {path for path, module in net.named_modules() if isinstance(module, SelfActivating)}
    inner = ("bn1", "bn_1", "bn_a", *(["bn2"] if name == "timm-resnet50" else []))
    assert activating == {path for path in norms if path.rpartition(".")[2] in inner}
    assert norms > activating
    relus = [sum(isinstance(module, nn.ReLU) for module in each.modules()) for each in (net, plain)]
    assert relus[1] - relus[0] == len(activating)
    assert net.state_dict().keys() >= {key for key in plain.state_dict() if "running" not in key and "num_" not in key}
    net(torch.randn(2, 3, 32, 32))[0].sum().backward()
    assert all(
        parameter.grad is not None for path, parameter in net.named_parameters() if "tau" in path or ".v" in path
    )


@pytest.mark.parametrize("norm", ["frn", "evonorm-s0"])
@pytest.mark.parametrize("act", [True, False])
def test_what_the_user_says_of_the_activation_holds_in_any_network(norm: str, act: bool) -> None:
    net = backbone("resnet8", norm, act=act)
    assert {module.activates for module in net.modules() if isinstance(module, SelfActivating)} == {act}
    assert isinstance(net.act1, nn.Identity if act else nn.ReLU)


@pytest.mark.parametrize(("norm", "alone"), [("frn", False), ("evonorm-s0", True)])
def test_in_a_network_that_says_nothing(norm: str, alone: bool) -> None:
    model = convert_norms(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU()), norm)
    assert model[1].activates == alone
    assert isinstance(model[2], nn.ReLU)


@pytest.mark.parametrize("norm", ["frn", "evonorm-s0"])
def test_fused_families_get_the_norms_own_activation_and_their_own_back(norm: str) -> None:
    build = norm_act_factory(norm, "silu")
    fused, bare = build(8), build(8, apply_act=False)
    assert (fused.activates, bare.activates) == (True, False)
    x = torch.randn(4, 8, 3, 3)
    torch.testing.assert_close(fused(x), norm_factory(norm, act=True)(8)(x))
    torch.testing.assert_close(bare(x), norm_factory(norm, act=False)(8)(x))
    converted = convert_norms(
        nn.Sequential(BatchNormAct2d(8, act_layer="silu"), BatchNormAct2d(8, apply_act=False)), norm
    )
    assert [layer.activates for layer in converted] == [True, False]
    for other in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        torch.testing.assert_close(other(x), converted(x))
    back = convert_norms(converted, "bn").eval()
    torch.testing.assert_close(back(x), nn.functional.silu(x / (1 + 1e-5) ** 0.5) / (1 + 1e-5) ** 0.5)


def test_our_own_backbone_gets_its_relu_back() -> None:
    net = convert_norms(backbone("resnet8", "frn"), "bn").eval()
    plain = backbone("resnet8", "bn").eval()
    plain.load_state_dict(net.state_dict(), strict=False)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(net(x)[0], plain(x)[0])


def convolutional(norm: str = "gn+ws") -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm_factory(norm)(8), nn.ReLU(), nn.Conv2d(8, 8, 1, bias=False))


def test_unfinished_weight_standardisation_is_an_error_and_finishing_twice_is_finishing_once() -> None:
    net, x = convolutional(), torch.randn(2, 3, 5, 5)
    with pytest.raises(RuntimeError, match=r"finish_norms\(model, \"gn\+ws\"\)"):
        net(x)
    y = finish_norms(net, "gn+ws")(x)
    assert torch.equal(finish_norms(net, "gn+ws")(x), y)


def test_standardised_networks_keep_names_states_and_copies() -> None:
    net, x = finish_norms(convolutional(), "gn+ws"), torch.randn(2, 3, 5, 5)
    plain = convolutional("gn")
    assert net.state_dict().keys() == plain.state_dict().keys()
    net.load_state_dict(plain.state_dict())
    assert all(torch.equal(one, other) for one, other in zip(net.parameters(), plain.parameters(), strict=True))
    y = net(x)
    for convolution in (plain[0], plain[3]):
        weight = convolution.weight.data
        mean, var = weight.mean((1, 2, 3), keepdim=True), weight.var((1, 2, 3), correction=0, keepdim=True)
        convolution.weight.data = (weight - mean) / (var + 1e-6).sqrt()
    torch.testing.assert_close(y, plain(x))
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(x), y)
    other.load_state_dict({key: value + 1 for key, value in net.state_dict().items()})
    torch.testing.assert_close(net(x), y)


def test_converting_to_and_from_standardised_weights() -> None:
    net, x = (
        timm.create_model("resnet18", layers=(1, 1, 1, 1), channels=(8, 8, 8, 8), stem_width=8),
        torch.randn(2, 3, 32, 32),
    )
    weights = {name: value.clone() for name, value in net.named_parameters()}
    kinds = [type(module) for module in net.modules() if isinstance(module, nn.Conv2d)]
    before = net.eval()(x)
    convert_norms(net, "gn+ws")
    assert not torch.allclose(convert_norms(copy.deepcopy(net), "gn")(x), net(x))
    convert_norms(net, "gn+ws")
    convert_norms(net, "bn")
    assert [type(module) for module in net.modules() if isinstance(module, nn.Conv2d)] == kinds
    assert all(torch.equal(value, weights[name]) for name, value in net.named_parameters())
    torch.testing.assert_close(net(x), before)


def test_a_convolution_with_additions_is_refused_and_nothing_is_changed() -> None:
    class Padded(nn.Conv2d):
        """Somebody's own."""

    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), Padded(8, 8, 1))
    kinds = [type(module) for module in net]
    with pytest.raises(ValueError, match=r"2 is a .*Padded; only weights of a plain Conv2d"):
        convert_norms(net, "gn+ws")
    assert [type(module) for module in net] == kinds


def test_weights_of_one_number_an_output_stay_as_they_are() -> None:
    net = finish_norms(nn.Sequential(nn.Conv2d(8, 8, 1, groups=8, bias=False), norm_factory("gn+ws")(8)), "gn+ws")
    assert type(net[0]) is nn.Conv2d


def test_half_of_batch_norms_averages_is_taken_and_given() -> None:
    plain = nn.BatchNorm2d(8)
    plain(torch.randn(8, 8, 3, 3))
    layer = convert_norms(copy.deepcopy(plain), "spnorm")
    assert torch.equal(layer.running_mean, plain.running_mean[:4])
    back = convert_norms(layer, "bn")  # which has no use for a half
    assert torch.equal(back.running_mean, torch.zeros(8))
    assert back.weight is layer.weight


def test_a_fresh_normalised_batch_norm_is_batch_norm_if_asked() -> None:
    x = torch.randn(8, 4, 3, 3)
    torch.testing.assert_close(norm_factory("nbn", alpha=None)(4)(x), nn.BatchNorm2d(4)(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm_factory("nbn")(4)(x), nn.BatchNorm2d(4)(x) / 2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("norm", "options", "message"),
    [
        ("nbn", {"floor": 0.0}, "floor must be above 0"),
        ("spnorm", {"ratio": 1.5}, "ratio is a part"),
        ("spnorm", {"variance": "none"}, "there are unbiased, biased"),
        ("evonorm-s0", {"groups": 3}, "8 channels can't be cut into 3 groups"),
    ],
)
def test_options_that_make_no_sense_are_refused(norm: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        norm_factory(norm, **options)(8)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_any_part_of_any_width_can_be_batch_normalised(ratio: float) -> None:
    layer, x = norm_factory("spnorm", ratio=ratio)(5), torch.randn(6, 5, 3, 3)
    y = layer(x)
    cut = int(5 * ratio)
    expected = nn.BatchNorm2d(5)(x)[:, :cut]  # channel by channel, whatever the others are
    torch.testing.assert_close(y[:, :cut], expected, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(y).all()
    torch.testing.assert_close(layer.eval()(x)[:1], layer(x[:1]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", ["nbn", "spnorm", "frn", "evonorm-s0", "gn+ws"])
def test_runs_and_goes_on_to_the_same_bits(norm: str, registry: Registry, tmp_path: Path) -> None:
    spec = resolve("tiny", registry, Settings({"tiny": {**TINY, "backbone": "resnet8"}}, {}), norm=norm, tasks=2)

    def weights(folder: Path) -> dict[str, torch.Tensor]:
        return Checkpoints(folder / "checkpoints", {}).newest()["net"]

    whole = run(spec, tmp_path / "whole", device="cpu", registry=registry)

    def kill(event: dict[str, Any]) -> None:
        if event["event"] == "epoch" and event["task"] == 2:
            raise RuntimeError("as if the process had died")

    with pytest.raises(RuntimeError, match="as if the process had died"):
        run(spec, tmp_path / "half", device="cpu", registry=registry, watch=[kill])
    resume(tmp_path / "half", device="cpu", registry=registry)
    again = weights(tmp_path / "half")
    assert all(torch.equal(value, again[name]) for name, value in weights(tmp_path / "whole").items())
    assert len(whole.matrix) == 2


@pytest.mark.parametrize("norm", ["gn+ws", "frn", "evonorm-s0", "nbn", "spnorm"])
def test_a_backbone_compiles_in_one_piece(norm: str) -> None:
    """Standardised convolutions and left-out activations included."""
    torch._dynamo.reset()
    net, x = backbone("resnet8", norm).double(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, backend="aot_eager")
    for module in (net, compiled):
        module(x)[0].square().sum().backward()
    for (name, one), other in zip(net.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, msg=name, rtol=1e-8, atol=1e-8 * float(one.grad.abs().max()))
    torch.testing.assert_close(compiled.eval()(x)[0], net.eval()(x)[0])
