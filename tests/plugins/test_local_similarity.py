"""k-means against slow references, imprinted proxies, and what of them moves when."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn
from torch.nn import functional as F

from cilnorm.batch import Task
from cilnorm.method import Phase, Schedule
from cilnorm.network import Network
from cilnorm_methods._local_similarity import LocalSimilarity, k_means, lloyd


def one_point_at_a_time(points: Tensor, centres: Tensor) -> tuple[Tensor, float]:
    """Lloyd's algorithm for one start with Python loops."""
    centres, before = centres.clone(), None
    while True:
        nearest = [min(range(len(centres)), key=lambda c: float((p - centres[c]).square().sum())) for p in points]
        if nearest == before:
            break
        before = nearest
        for c in range(len(centres)):
            members = [p for p, chosen in zip(points, nearest, strict=True) if chosen == c]
            if members:
                centres[c] = sum(members) / len(members)
    return centres, sum(min(float((p - c).square().sum()) for c in centres) for p in points)


def some_points(seed: int, count: int = 60, dim: int = 5) -> Tensor:
    return torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(4))
def test_lloyd_agrees_with_the_slow_reference_and_with_scipy(seed: int) -> None:
    points = some_points(seed)
    starts = torch.stack([points[start : start + 6] for start in (0, 10, 30)])
    centres, costs = lloyd(points, starts)
    for start, found, cost in zip(starts, centres, costs, strict=True):
        expected, expected_cost = one_point_at_a_time(points, start)
        torch.testing.assert_close(found, expected)
        assert cost.item() == pytest.approx(expected_cost)
        of_scipy, _ = kmeans2(points.numpy(), start.numpy(), iter=300, minit="matrix")
        np.testing.assert_allclose(found.numpy(), of_scipy, atol=1e-12)


def test_a_centre_without_points_stays() -> None:
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    far = torch.tensor([[0.4, 0.0], [9.0, 9.0]])
    centres, _ = lloyd(points, far.unsqueeze(0))
    torch.testing.assert_close(centres[0], torch.tensor([[0.5, 0.0], [9.0, 9.0]]))


def test_k_means_finds_clusters_that_are_there_and_beats_random_starts() -> None:
    torch.manual_seed(0)
    truth = 10 * some_points(1, count=8)
    points = (truth.unsqueeze(1) + 0.01 * some_points(2, count=160).view(8, 20, 5)).flatten(0, 1)
    centres = k_means(points, 8)
    assert torch.cdist(truth, centres).amin(1).max() < 0.1
    blurred = some_points(3, count=200)
    best = lloyd(blurred, k_means(blurred, 10).unsqueeze(0))[1].item()
    starts = torch.stack([blurred[torch.randperm(200)[:10]] for _ in range(20)])
    assert best < lloyd(blurred, starts)[1].median().item()


def test_k_means_of_fewer_points_than_centres() -> None:
    points = some_points(0, count=3)
    centres = k_means(points, 10)
    assert centres.shape == (10, 5)
    assert torch.cdist(points, centres).amin(1).max() < 1e-12
    assert k_means(torch.ones(4, 2), 3).tolist() == [[1, 1]] * 3


class Plain(LocalSimilarity):
    """The base with no objective of its own."""


def grown(method: LocalSimilarity, embeddings: list[Tensor]) -> Network:
    torch.manual_seed(0)
    net = Network(nn.Linear(3, 4), method.head(4))
    method.grow(net, Task(0, (3, 2)), lambda: pytest.fail("the first task has nothing to look at"))
    method.grow(net, Task(1, (3, 2)), lambda: embeddings)
    return net


def test_new_proxies_are_centres_of_their_classes_as_long_as_the_old_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings = [3 * torch.randn(40, 4, generator=generator) + shift for shift in (1, -1)]
    net = grown(Plain(proxies=5), embeddings)
    old, new = (block.weight.detach() for block in net.head.blocks)
    assert old.shape == (15, 4)
    length = old.norm(dim=1).mean()
    for centres, of_class in zip(new.split(5), embeddings, strict=True):
        units = F.normalize(of_class, dim=1).double()
        # Each is the mean of the points it is nearest to: a fixed point of Lloyd's algorithm, within float32.
        again, _ = one_point_at_a_time(units, (centres / length).double())
        torch.testing.assert_close(again.float() * length, centres, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(new.norm(dim=1), length.expand(10))  # centres of unit vectors lie inside the sphere


def test_what_moves_when() -> None:
    method = Plain()
    net = grown(method, [torch.randn(20, 4), torch.randn(20, 4)])
    old, new = (block.weight for block in net.head.blocks)
    first, tail = method.phases(Task(1, (3, 2)))
    main = list(method.parameters(net, first))
    assert [id(p) for p in main] == [id(p) for p in (*net.backbone.parameters(), new, net.head.scale)]
    assert [id(p) for p in method.parameters(net, tail)] == [id(old), id(new)]
    assert method.phases(Task(0, (3, 2))) == (Phase(),)


def test_the_tail_is_the_authors() -> None:
    """20 epochs at 0.05 after 160 at 0.1."""
    _, tail = Plain().phases(Task(1, (3, 2)))
    run = Schedule(160, 0.1, momentum=0.9, weight_decay=5e-4, annealing="cosine", clamp=5.0)
    schedule = tail.schedule_in(run)
    assert schedule == Schedule(20, 0.05, momentum=0.9, weight_decay=5e-4, clamp=5.0)
    assert (tail.rows, tail.backbone) == ("balanced", "train")
    assert {schedule.rate(epoch) for epoch in range(20)} == {0.05}
