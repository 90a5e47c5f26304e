"""A network tells its layers what is news, and says four things of an image."""

from __future__ import annotations

import copy

import torch
from torch import nn

from cilnorm.batch import Composition
from cilnorm.heads import Linear
from cilnorm.network import Network
from tests.fake import Tiny
from tests.test_batch import Listener


def test_layers_hear_only_what_is_news() -> None:
    listener = Listener()
    net = Network(listener, Linear(4))
    first, second = Composition(8, 0, 0), Composition(6, 2, 1)
    for composition in (first, first, second, second, first):
        net.observe(composition)
    assert listener.heard == [first, second, first]


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
