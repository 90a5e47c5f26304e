"""Norms in other people's networks: timm, torchvision, and models that are there already."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.layers import BatchNormAct2d, convert_sync_batchnorm, freeze_batch_norm_2d
from torch import nn

from cilnorm import registry
from cilnorm.batch import Composition
from cilnorm.hookspecs import Norm
from cilnorm.norms import convert_norms, finish_norms, norm_act_factory, norm_factory
from cilnorm.testing.toys import tell
from cilnorm_norms.task_balanced import TaskBalancedBatchNorm2d
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

NORMS = list(registry.load().norms)
CLASSES = (  # to timm
    "adaptivebalance|classbalanced|taskbalanced|splitbatch|continual|"
    "normalisedbatch|spnorm|filterresponse|evonorm|weightstandardised"
)
SMALL: dict[str, Any] = {"num_classes": 3, "layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8), "stem_width": 8}


def kinds(model: nn.Module) -> set[type]:
    """Classes of everything with channels that isn't a convolution."""
    return {type(m) for m in model.modules() if hasattr(m, "num_features") and not isinstance(m, type(model))}


def with_history(model: nn.Module) -> nn.Module:
    """The model with γ, β and running statistics as after training."""
    generator = torch.Generator().manual_seed(3)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.dim() == 1:
            low = 0.5 if "weight" in name or "var" in name else -0.2
            value.data = torch.rand(value.shape, generator=generator) * 0.5 + low
    return model


def test_a_name_a_record_and_options_make_classes_or_partials_of_them() -> None:
    record = registry.load().norms["tbbn"]
    assert norm_factory("tbbn") is norm_factory(record) is TaskBalancedBatchNorm2d
    partial = norm_factory("tbbn", splits="exact")
    assert isinstance(partial, functools.partial)
    assert partial(4).splits == "exact"


def test_a_name_that_is_not_there_lists_what_is() -> None:
    with pytest.raises(KeyError, match=r"no norm called 'tbn'.*tbbn"):
        norm_factory("tbn")


def test_a_function_of_a_stranger_becomes_a_class() -> None:
    """timm's fused families would call a function as if it brought the activation along."""

    def third(num_features: int, **_: Any) -> nn.Module:
        return nn.GroupNorm(3, num_features)

    factory = norm_factory(Norm("third", third))
    assert isinstance(factory, type)
    assert isinstance(factory(6), nn.GroupNorm)
    with pytest.raises(AssertionError, match="third"):
        timm.create_model("resnetv2_50", norm_layer=factory)


@pytest.mark.parametrize("name", NORMS)
def test_norm_layer_of_timm_and_torchvision(name: str) -> None:
    factory = norm_factory(name)
    for model in (
        timm.create_model("resnet18", norm_layer=factory, **SMALL),
        torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], norm_layer=factory),
    ):
        assert type(factory(8)) in {type(module) for module in model.modules()}
        tell(finish_norms(model, name), Composition(6, 2, 2))
        model(torch.randn(8, 3, 32, 32)).square().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", [name for name in NORMS if name not in {"bn", "in", "gn", "ln2d", "sn", "brn"}])
def test_fused_families_refuse_the_bare_norm(name: str) -> None:
    with pytest.raises(AssertionError, match=f"No equivalent norm_act layer for ({CLASSES})"):
        timm.create_model("resnetv2_50", norm_layer=norm_factory(name))


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_norm_act_factory_keeps_the_activation(act: str) -> None:
    build = norm_act_factory("tbbn", act, eps=1e-3)
    x = torch.randn(4, 6, 3, 3)
    fused, bare = build(6).eval(), build(6, apply_act=False).eval()
    assert fused.eps == 1e-3
    torch.testing.assert_close(fused(x), getattr(nn.functional, act)(bare(x)))


def test_fused_layers_copy_and_pickle() -> None:
    layer = norm_act_factory("tbbn", "silu")(4)
    layer.compose(Composition(6, 2, 1))
    x = torch.randn(8, 4, 2, 2)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is type(layer)
        torch.testing.assert_close(other(x), layer(x))
    assert layer.state_dict().keys() == BatchNormAct2d(4).state_dict().keys()


@pytest.mark.parametrize("name", ["tbbn", "tbbn+cn", "cn"])
@pytest.mark.parametrize("architecture", ["resnet18", "resnetv2_50", "efficientnet_lite0", "mobilenetv3_small_050"])
def test_conversion_keeps_weights_and_statistics(architecture: str, name: str) -> None:
    original = with_history(timm.create_model(architecture, num_classes=3)).eval()
    parameters, state = {id(p) for p in original.parameters()}, copy.deepcopy(original.state_dict())
    before = copy.deepcopy(original)
    converted = convert_norms(original, name)
    assert converted is original
    assert {id(p) for p in converted.parameters()} == parameters
    assert converted.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in converted.state_dict().items())
    assert not converted.training
    assert not kinds(converted) & {nn.BatchNorm2d, BatchNormAct2d}
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        if name == "tbbn":
            torch.testing.assert_close(converted(x), before(x))
        torch.testing.assert_close(convert_norms(converted, "bn")(x), before(x))


@pytest.mark.parametrize("name", NORMS)
def test_every_norm_can_be_converted_to_and_trains(name: str) -> None:
    model = convert_norms(timm.create_model("resnetv2_50", num_classes=3, layers=(1, 1, 1, 1)), name)
    activations = sum(isinstance(m, nn.ReLU) for m in model.modules())
    assert activations == sum(isinstance(m, nn.ReLU) for m in convert_norms(copy.deepcopy(model), "bn").modules())
    tell(model, Composition(6, 2, 2))
    model(torch.randn(8, 3, 32, 32)).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_renormalisation_evaluates_as_the_batch_norm_it_was_made_of() -> None:
    layer = with_history(nn.BatchNorm2d(4)).eval()
    x = torch.randn(5, 4, 2, 2)
    renormalising = convert_norms(copy.deepcopy(layer), "brn")
    assert renormalising.eps == 1e-3
    torch.testing.assert_close(renormalising(x), layer(x), rtol=2e-3, atol=2e-3)


def test_settings_of_batch_norm_are_kept() -> None:
    layer = convert_norms(nn.BatchNorm2d(4, eps=1e-3, momentum=None, affine=False), "tbbn")
    assert (layer.eps, layer.momentum, layer.affine) == (1e-3, None, False)
    assert convert_norms(nn.BatchNorm2d(4), "tbbn", eps=0.5).eps == 0.5


def test_a_shared_layer_stays_shared() -> None:
    layer = nn.BatchNorm2d(4)
    model = convert_norms(nn.Sequential(layer, nn.ReLU(), layer), "tbbn")
    assert model[0] is model[2]
    assert isinstance(model[0], TaskBalancedBatchNorm2d)


def test_nothing_to_convert_is_an_error_that_names_the_model() -> None:
    with pytest.raises(ValueError, match="ConvNeXt has no 2-d batch norm that could become tbbn"):
        convert_norms(timm.create_model("convnext_atto"), "tbbn")


def test_widths_that_do_not_fit_are_an_error_that_names_model_and_layer_and_changes_nothing() -> None:
    model = timm.create_model("efficientnet_b0")
    before = {type(module) for module in model.modules()}
    with pytest.raises(ValueError, match=r"EfficientNet\.blocks\.0\.0\.bn2 can't be cn: 16 channels .* 32 groups"):
        convert_norms(model, "cn", groups=32)
    assert {type(module) for module in model.modules()} == before


def test_a_batch_norm_with_additions_is_refused() -> None:
    class Noisy(nn.BatchNorm2d):
        """Somebody's own."""

    with pytest.raises(TypeError, match=r"1 is a .*Noisy"):
        convert_norms(nn.Sequential(nn.Conv2d(3, 4, 1), Noisy(4)), "tbbn")


TOOLS = [nn.SyncBatchNorm.convert_sync_batchnorm, convert_sync_batchnorm, freeze_batch_norm_2d]


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("name", [name for name in NORMS if name != "bn"])
def test_tools_for_batch_norm_leave_the_shelf_alone(name: str, tool: Any) -> None:
    model = nn.Sequential(norm_factory(name)(8), norm_act_factory(name, "silu")(8))
    before = list(model)
    after = list(tool(model))
    assert all(one is other for one, other in zip(before, after, strict=True))


def test_a_batch_norm_of_a_stranger_stays_what_it_is_when_fused() -> None:
    class Doubled(nn.BatchNorm2d):
        """Twice as large."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    layer = norm_act_factory(Norm("doubled", Doubled), "relu")(4)
    x = torch.randn(6, 4, 2, 2)
    torch.testing.assert_close(layer(x), nn.BatchNorm2d(4)(x).relu() * 2)


@pytest.mark.parametrize("tool", TOOLS[1:])
def test_tools_of_timm_keep_the_activation_of_fused_batch_norm(tool: Any) -> None:
    fused = tool(norm_act_factory("bn", "silu")(8))
    assert isinstance(fused.act, nn.SiLU)


def test_the_page_on_the_shelf_has_every_norm_and_option() -> None:
    text = (ROOT / "docs" / "norms.md").read_text(encoding="utf-8")
    for name, record in registry.load().norms.items():
        [line] = [line for line in text.splitlines() if line.startswith(f"| `{name}` ")]
        own = set(inspect.signature(record.build).parameters) - set(inspect.signature(nn.BatchNorm2d).parameters)
        assert all(f"`{option}" in line for option in own)
