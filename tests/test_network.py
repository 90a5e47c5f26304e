"""A network tells its layers what is news, and says four things of an image."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from cilnorm.batch import Composition, CompositionWarning
from cilnorm.experiment.assembly import assemble
from cilnorm.heads import Linear
from cilnorm.hookspecs import Norm
from cilnorm.network import Network
from cilnorm.registry import Registry
from cilnorm.spec import Spec
from tests.fake import Tiny
from tests.test_batch import Listener


def test_layers_hear_only_what_is_news() -> None:
    listener = Listener()
    net = Network(listener, Linear(4))
    first, second = Composition(8, 0, 0), Composition(6, 2, 1)
    for composition in (first, first, second, second, first):
        net.observe(composition)
    assert listener.heard == [first, second, first]


def test_a_network_whose_layers_need_no_telling_is_observed_without_a_word(recwarn: pytest.WarningsRecorder) -> None:
    Network(nn.BatchNorm2d(4), Linear(4)).observe(Composition(8, 0, 0))
    assert not recwarn.list


def deaf_norm(registry: Registry) -> Registry:
    """The registry, and a norm that claims to listen."""
    norms = replace(
        registry.norms, records={**registry.norms.records, "deaf": Norm("deaf", nn.BatchNorm2d, composition_aware=True)}
    )
    return replace(registry, norms=norms)


@pytest.mark.parametrize(("norm", "warnings"), [("deaf", 1), ("tbbn", 0), ("bn", 0)])
def test_a_norm_that_claims_to_listen_and_does_not_is_told_of(
    registry: Registry, tiny: Callable[..., Spec], norm: str, warnings: int, recwarn: pytest.WarningsRecorder
) -> None:
    parts = assemble(replace(tiny(norm="bn"), norm=norm), deaf_norm(registry), torch.device("cpu"))
    for past in (4, 0):
        parts.net.observe(Composition(12, past, 1))
    said = [str(each.message) for each in recwarn.list if each.category is CompositionWarning]
    assert len(said) == warnings
    assert all("deaf is composition-aware, but no layer of tiny with it listens; derive" in text for text in said)


def test_a_copy_keeps_what_it_was_told() -> None:
    net = Network(Listener(), Linear(4))
    net.observe(Composition(8, 0, 0))
    twin = copy.deepcopy(net)
    twin.observe(Composition(6, 2, 1))
    assert net.backbone.heard == [Composition(8, 0, 0)]
    assert twin.backbone.heard == [Composition(8, 0, 0), Composition(6, 2, 1)]


def test_output_has_logits_scores_embedding_and_maps() -> None:
    net = Network(Tiny(nn.BatchNorm2d), Linear(Tiny.dim))
    net.head.grow(2)
    net.head.grow(3)
    out = net(torch.rand(4, 3, 8, 8))
    assert out.logits.shape == out.scores.shape == (4, 5)
    assert out.embedding.shape == (4, Tiny.dim)
    assert [tuple(stage.shape) for stage in out.maps] == [(4, Tiny.dim, 8, 8)]


def test_growing_a_head_leaves_old_outputs_as_they_were() -> None:
    head = Linear(4)
    head.grow(2)
    embedding = torch.rand(3, 4)
    before, _ = head(embedding)
    head.grow(3)
    logits, scores = head(embedding)
    assert torch.equal(logits[:, :2], before)
    assert torch.equal(logits, scores)


def test_a_linear_head_may_start_as_pycils() -> None:
    """Uniform in ±√(3/dim), no bias; the old block stays as it is."""
    torch.manual_seed(0)
    head = Linear(48)
    head.start = "kaiming"
    head.grow(200)
    first = head.blocks[0]
    assert isinstance(first, nn.Linear)
    assert first.weight.abs().max().item() == pytest.approx((3 / 48) ** 0.5, rel=0.01)
    assert not first.bias.any()
    before = first.weight.clone()
    head.grow(5)
    assert torch.equal(head.weights[:200], before)
