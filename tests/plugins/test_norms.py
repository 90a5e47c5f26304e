"""Every other norm against the released one's own numbers, and against what its docstring says."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cilnorm.batch import Composition
from cilnorm.hookspecs import Norm
from cilnorm.norms import norm_factory
from cilnorm.registry import load
from cilnorm.testing.layers import LAYOUTS, in_memory, made, stepped
from cilnorm.testing.norm_checks import compiled, graphs_of_ten_tasks
from cilnorm.testing.toys import rows
from cilnorm_norms.batch import BatchNorm2d
from cilnorm_norms.continual import ContinualNorm2d, TaskBalancedContinualNorm2d
from cilnorm_norms.group import GroupNorm2d
from cilnorm_norms.instance import InstanceNorm2d
from cilnorm_norms.layer import PixelLayerNorm2d
from cilnorm_norms.renormalisation import BatchRenorm2d
from cilnorm_norms.switchable import SwitchNorm2d
from cilnorm_norms.task_balanced import TaskBalancedBatchNorm2d
from tests import golden as gold

PRECISIONS = [pytest.param(torch.float64, id="float64"), pytest.param(torch.float32, id="float32")]


def build(meta: dict[str, Any]) -> nn.Module:
    """The layer that a golden file's settings describe."""
    channels, eps = meta["shape"][1], meta["eps"]
    match meta["kind"]:
        case "BatchRenorm2d":
            return BatchRenorm2d(channels, eps, meta["momentum"])
        case "ContinualNorm":
            return ContinualNorm2d(channels, eps, meta["momentum"], groups=meta["num_groups"])
        case "SwitchNorm2d":
            return SwitchNorm2d(channels, eps, 1 - meta["momentum"])
        case "GroupNorm2d":
            return GroupNorm2d(channels, eps, affine=False, channels_per_group=meta["channels_per_group"])
        case "CustomSplitBatchNorm":
            return BatchNorm2d(channels, eps, meta["momentum"])
    raise AssertionError(meta["kind"])


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize(
    "name", [*gold.names("brn"), *gold.names("cn"), *gold.names("sn"), *gold.names("gn"), "splitbn_ns1"]
)
def test_equals_the_released_layer(name: str, dtype: torch.dtype) -> None:
    golden = gold.Golden(name)
    double = 1e-6 if name.startswith("brn") else 1e-10  # the released limits r_max and d_max are float32
    gold.replay_all(build(golden.meta), golden, dtype, {"": double if dtype == torch.float64 else 2e-5})


def by_group(x: Tensor, groups: int, eps: float = 1e-5) -> Tensor:
    """One image and group at a time."""
    y = torch.empty_like(x)
    for image, out in zip(x, y, strict=True):
        for part, target in zip(image.chunk(groups), out.chunk(groups), strict=True):
            target.copy_((part - part.mean()) / (part.var(correction=0) + eps).sqrt())
    return y


def with_affine(layer: nn.Module, y: Tensor) -> Tensor:
    return y * layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1)


@pytest.mark.parametrize(
    ("layer", "reference"),
    [
        (GroupNorm2d(6, groups=3), lambda x: by_group(x, 3)),
        (GroupNorm2d(6, channels_per_group=3), lambda x: by_group(x, 2)),
        (GroupNorm2d(6, channels_per_group=16), lambda x: by_group(x, 1)),
        (InstanceNorm2d(6), lambda x: by_group(x, 6)),
        (PixelLayerNorm2d(6), lambda x: (x - x.mean(1, True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()),
    ],
)
def test_batch_free_layers_equal_their_equation(layer: nn.Module, reference: Callable[[Tensor], Tensor]) -> None:
    layer.double()
    for value in layer.parameters():
        nn.init.uniform_(value, 0.5, 1.5)
    x = torch.randn(4, 6, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(layer(x), with_affine(layer, reference(x)))
    torch.testing.assert_close(layer.eval()(x), with_affine(layer, reference(x)))


def test_groups_first_then_task_balanced() -> None:
    composition, x = Composition(12, 4, 2), torch.randn(16, 8, 3, 3, dtype=torch.float64)
    both, second = TaskBalancedContinualNorm2d(8, groups=4).double(), TaskBalancedBatchNorm2d(8).double()
    both.compose(composition)
    second.compose(composition)
    torch.testing.assert_close(both(x), second(F.group_norm(x, 4)))
    torch.testing.assert_close(both.running_var, second.running_var)


@pytest.mark.parametrize("layer", [GroupNorm2d, ContinualNorm2d, TaskBalancedContinualNorm2d])
def test_groups_that_do_not_fit_are_refused(layer: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match="12 channels can't be cut into 8 groups"):
        layer(12, groups=8)


def test_channels_per_group_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="24 channels can't be cut into groups of 16"):
        GroupNorm2d(24, channels_per_group=16)


def test_renormalisation_without_averages_is_refused() -> None:
    with pytest.raises(ValueError, match="track_running_stats"):
        BatchRenorm2d(3, track_running_stats=False)


def test_renormalisation_of_a_constant_channel_has_gradients() -> None:
    x = torch.ones(4, 2, 2, 2, requires_grad=True)
    BatchRenorm2d(2)(x).square().sum().backward()
    assert torch.isfinite(x.grad).all()


def test_switchable_of_one_pixel_is_finite() -> None:
    assert torch.isfinite(SwitchNorm2d(3)(torch.randn(4, 3, 1, 1))).all()


# What our own layers promise beyond what the kit asks of a stranger's


VARIANTS = {"frn act": ("frn", {"act": True}), "evonorm-s0 bare": ("evonorm-s0", {"act": False})}
RECORDS = [*load().norms.values()]
RECORDS += [
    replace(load().norms[of], name=name, build=partial(load().norms[of].build, **options))
    for name, (of, options) in VARIANTS.items()
]
WHOLE = [record for record in RECORDS if record.name not in {"in", "ln2d", "gn", "cn", "cn*", "tbbn+cn"}]
AWARE = [record for record in RECORDS if record.composition_aware]


def of(records: list[Norm]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("record", records, ids=lambda record: record.name)


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("size", [(8, 3, 5), (8, 1, 1), (1, 3, 3)], ids=str)
@of(WHOLE)
def test_gradients_reach_images_of_one_place_and_of_one_channel(
    record: Norm, size: tuple[int, int, int], mode: bool
) -> None:
    """Not where an image or place is normalised by itself, and nothing is left of it then."""
    for dtype in (torch.float32, torch.float64):
        layer, x = made(record, size[0]).to(dtype).train(mode), rows(*size, dtype=dtype).requires_grad_()
        layer(x).square().sum().backward()
        assert torch.isfinite(x.grad).all()
        assert x.grad.abs().max() > 0


# The gradient of nbn's γ is what is left of a hundred times as large a one when its part along γ is taken away.
SUMS = {"nbn": 3e-4}


@of(RECORDS)
def test_parameters_learn_the_same_in_both_layouts(record: Norm) -> None:
    """In float32 to 1e-5, where the kit allows a stranger's sums more; with a gradient of the images and without."""
    alone, steps = [], []
    for layout in LAYOUTS:
        layer, x = made(record), in_memory(rows(8, 3, 5), layout)
        layer(x).square().mul(rows(8, 3, 5, seed=1)).sum().backward()
        alone.append([parameter.grad for parameter in layer.parameters()])
        steps.append(stepped(made(record), x))
    bound = SUMS.get(record.name, 1e-5)
    for one, other in zip(alone[0] + steps[0], alone[1] + steps[1], strict=True):
        torch.testing.assert_close(one, other, rtol=bound, atol=bound, check_stride=False)


@of(RECORDS)
def test_takes_images_only(record: Norm) -> None:
    with pytest.raises(ValueError, match=r"\(N, C, H, W\), got one of 3 dimensions"):
        made(record)(rows(8, 4))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tbbn", "brn"])
def test_inductor_compiles_in_one_piece(name: str) -> None:
    """The kit asks the same of the backend ``aot_eager``."""
    compiled(load().norms[name], "inductor")


@pytest.mark.slow
@of(AWARE)
def test_ten_tasks_compile_no_more_often_than_there_are_splits(record: Norm) -> None:
    """r = 1, 2, 4, 8, 16; dynamo of torch 2.6 takes all after the first in one graph."""
    assert 1 < graphs_of_ten_tasks(record) <= 5


@pytest.mark.parametrize("name", ["bn", "cn", "cn*", "tbbn", "tbbn+cn"])
def test_state_is_that_of_batch_norm_both_ways(name: str) -> None:
    layer, plain = made(load().norms[name]), nn.BatchNorm2d(8)
    plain(rows(8, 3, 3))
    assert layer.load_state_dict(plain.state_dict(), strict=True)
    stepped(layer, rows(8, 3, 3))
    assert plain.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(plain.running_var, layer.running_var)


@of(RECORDS)
def test_says_its_settings(record: Norm) -> None:
    build = norm_factory(record)
    text = repr(build(8, eps=0.0123, affine=False))
    options = {key for key, value in inspect.signature(build).parameters.items() if value.kind is value.KEYWORD_ONLY}
    assert "0.0123" in text
    assert "affine=False" in text
    for option in options - {"channels_per_group", "groups"}:
        assert f"{option}=" in text
    if "groups" in options:
        assert repr(build(16, groups=2)) != repr(build(16, groups=4))


@of(AWARE)
def test_a_layer_told_nothing_or_told_wrong_says_so(record: Norm) -> None:
    assert AWARE
    with pytest.raises(RuntimeError, match="set_composition"):
        norm_factory(record)(8)(rows(8, 2, 2))
    with pytest.raises(ValueError, match="the composition says 16 rows, the batch has 9"):
        made(record)(rows(8, 2, 2, count=9))
