"""A backbone of several extractors: which of them learns, is told, is measured, and how the head grows with them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from cilnorm.batch import Composition, modules_within
from cilnorm.growing import ExpandableBackbone, GrowingNetwork
from cilnorm.heads import Expanding
from cilnorm.hookspecs import Norm
from cilnorm.norms import finish_norms
from cilnorm.registry import Registry, load
from cilnorm.running import measure_statistics
from cilnorm.telling import rows
from tests.fake import Tiny

SHELF = load()
IMAGES = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def built(norm: Norm, backbone: Callable[..., nn.Module]) -> Callable[[], nn.Module]:
    return lambda: finish_norms(backbone(norm.build), norm)


def grown(
    norm: str = "tbbn", backbone: Callable[..., nn.Module] = Tiny, times: int = 2, start: str = "copy"
) -> GrowingNetwork:
    torch.manual_seed(0)
    body = ExpandableBackbone(built(SHELF.norms[norm], backbone), start)
    net = GrowingNetwork(body, Expanding(body.dim))
    for _ in range(times):
        net.grow(2)
    return net


def told(net: GrowingNetwork, task: int) -> Tensor:
    """The logits of a training pass over six current and two past rows."""
    net.observe(Composition(6, 2, task))
    with rows(
        net, past=torch.arange(8) >= 6, tasks=torch.tensor([task] * 6 + [0] * 2), labels=torch.arange(8) % 4, task=task
    ):
        return net.train()(IMAGES).logits


@pytest.mark.parametrize("norm", sorted(SHELF.norms))
def test_the_newest_extractor_alone_is_told_and_moves(norm: str) -> None:
    net = grown(norm, times=1)
    if SHELF.norms[norm].composition_aware or SHELF.norms[norm].needs_rows:
        with pytest.raises((RuntimeError, ValueError)):
            net.train()(IMAGES)
    net.observe(Composition(8, 0, 0))
    for times in (2, 3):
        net.grow(2)
        before = copy.deepcopy(net.state_dict())
        logits = told(net, times - 1)
        assert logits.shape == (8, 2 * times)
        changed = {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])}
        assert all(name.startswith(f"backbone.extractors.{times - 1}.") for name in changed)
        modes = [extractor.training for extractor in net.backbone.extractors]
        assert modes == [False] * (times - 1) + [True]


@pytest.mark.parametrize(
    "name", sorted(set(SHELF.backbones) - {"timm-resnet34", "timm-resnet50", "resnet34", "resnet44", "resnet56"})
)
def test_every_backbone_may_be_expanded(name: str) -> None:
    """Each extractor's part of the embedding is what it alone says of the images."""
    net = grown("bn", SHELF.backbones[name].build, times=3, start="fresh").eval()
    with torch.no_grad():
        out = net(IMAGES)
        parts = [extractor(IMAGES)[0] for extractor in net.backbone.extractors]
    assert out.logits.shape == (8, 6)
    assert torch.equal(out.embedding, torch.cat(parts, dim=1))
    assert not torch.allclose(parts[1], parts[2])


def test_a_new_extractor_is_a_copy_of_the_last_or_fresh() -> None:
    net = grown("tbbn", times=1)
    net.observe(Composition(8, 0, 0))
    net.train()(IMAGES)
    first = net.backbone.extractors[0]
    net.grow(2)
    new = net.backbone.extractors[1]
    assert all(torch.equal(tensor, first.state_dict()[name]) for name, tensor in new.state_dict().items())
    assert new.norm.running_mean.abs().sum() > 0
    with pytest.raises(RuntimeError, match="does not know what the batch is made of"):
        net.train()(IMAGES)  # what the last one was told is not the new one's
    fresh = grown("tbbn", times=2, start="fresh").backbone.extractors
    assert not torch.equal(fresh[0].conv.weight, fresh[1].conv.weight)


def test_a_copy_lies_where_the_last_one_does_and_has_its_type() -> None:
    net = grown("bn", times=1).double().to(memory_format=torch.channels_last)
    net.grow(2)
    weight = net.backbone.extractors[1].conv.weight
    assert weight.dtype == torch.float64
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_a_deep_copy_stands_alone() -> None:
    net = grown(times=2)
    twin = copy.deepcopy(net)
    twin.grow(2)
    assert (len(net.backbone.extractors), len(twin.backbone.extractors)) == (2, 3)
    assert [net.backbone.used, twin.backbone.used] == [(0, 1), (0, 1, 2)]
    told(twin, 2)
    told(net, 1)


def test_statistics_of_frozen_extractors_are_not_measured_anew() -> None:
    net = grown("bn", times=3)
    before = copy.deepcopy(net.state_dict())
    measure_statistics(net, [IMAGES, IMAGES.flip(0)])
    changed = {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])}
    own = "backbone.extractors.2.norm."
    assert changed == {f"{own}running_mean", f"{own}running_var", f"{own}num_batches_tracked"}


def test_roles_part_a_network() -> None:
    net = grown("bn", times=3)
    net.backbone.choose([0, 1], 1)
    norms = [extractor.norm for extractor in net.backbone.extractors]

    def found(*roles: str) -> list[bool]:
        modules = modules_within(net, *roles)
        return [any(norm is module for module in modules) for norm in norms]

    assert found("learning") == [False, True, False]
    assert found("learning", "frozen") == [True, True, False]
    assert found("learning", "frozen", "idle") == [True, True, True]
    assert net.eval().backbone(IMAGES)[0].shape == (8, 2 * Tiny.dim)


def test_the_head_grows_both_ways() -> None:
    """Old rows and columns, and old biases, stay; what is drawn lies in U(±√(3 / features)), biases are 0."""
    torch.manual_seed(0)
    head = Expanding(400)
    head.grow(3)
    with torch.no_grad():
        head.blocks[0].bias.fill_(0.5)
    for times, classes in ((2, 5), (3, 6)):
        old = head.blocks[0]
        head.grow(classes - old.out_features)
        (new,) = head.blocks
        assert new.weight.shape == (classes, 400 * times)
        assert torch.equal(new.weight[: old.out_features, : old.in_features], old.weight)
        assert new.bias.tolist() == [*old.bias.tolist(), *[0] * (classes - old.out_features)]
        bound = (3 / new.in_features) ** 0.5
        for drawn in (new.weight[old.out_features :], new.weight[: old.out_features, old.in_features :]):
            assert 0.95 * bound < drawn.abs().max() <= bound
        assert head.auxiliary is not None
        assert head.auxiliary.weight.shape == (1 + classes - old.out_features, 400)
    features = torch.randn(2, 1200)
    assert torch.equal(head(features)[0], head.blocks[0](features))


def test_the_head_of_the_authors_keeps_nothing() -> None:
    torch.manual_seed(0)
    head = Expanding(400, keep=False, bias=False, normal=True)
    head.grow(3)
    old = head.blocks[0].weight
    head.grow(2)
    new = head.blocks[0]
    assert new.bias is None
    assert not (new.weight[:3, :400] == old).any()
    assert new.weight.std().item() == pytest.approx(800**-0.5, rel=0.05)
    before, auxiliary = new.weight.detach().clone(), head.auxiliary.weight.detach().clone()
    head.redraw()
    assert not (head.blocks[0].weight == before).any()
    assert not (head.auxiliary.weight == auxiliary).any()


@pytest.mark.parametrize("norm", ["bn", "tbbn"])
def test_an_expandable_backbone_is_compiled_in_one_piece(norm: str) -> None:
    net = grown(norm, times=2)
    net.observe(Composition(6, 2, 1))
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    twin = copy.deepcopy(net)
    expected = net.train()(IMAGES).embedding
    body = torch.compile(twin.train().backbone, backend=backend, fullgraph=True)
    torch.testing.assert_close(body(IMAGES)[0], expected)
    assert len(graphs) == 1
    torch.compiler.reset()


def test_a_norm_with_options_goes_into_every_extractor(registry: Registry) -> None:
    build = partial(registry.norms["gn"].build, channels_per_group=4)
    body = ExpandableBackbone(lambda: Tiny(build))
    body.grow()
    assert [extractor.norm.num_groups for extractor in body.extractors] == [2, 2]
