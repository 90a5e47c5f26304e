"""Further norms against what the released layers themselves computed, and the two switches of running statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from cilnorm.norms import finish_norms, norm_factory
from cilnorm.running import freeze_statistics, measure_statistics
from tests.golden import FURTHER, Golden, check, load_initial_state, names, replay, replay_all

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
