"""What methods with a local similarity classifier share: how it starts, what of it moves, and when.

https://arxiv.org/abs/2004.13513, section 3.2 and appendix; differences of that paper's code, which this follows, are
named where they occur. A method on this base adds its own objective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cilnorm.batch import Task
from cilnorm.heads import Head, Proxies
from cilnorm.method import AUTHORS_PROTOCOL, Method, Phase, Tail
from cilnorm.network import Network

__all__ = ["LocalSimilarity", "k_means", "lloyd"]


def lloyd(points: Tensor, centres: Tensor, limit: int = 300) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from many starts at once: every point goes to its nearest centre, every centre to its mean.

    A centre that no point is nearest to stays where it is.

    Args:
        points: (n, d).
        centres: (starts, k, d).
        limit: rounds, if the assignment does not settle before.

    Returns:
        centres (starts, k, d) and the sum of squared distances to the nearest one, (starts,).
    """
    assigned: Tensor | None = None
    for _ in range(limit):
        nearest = torch.cdist(points.expand(len(centres), -1, -1), centres).argmin(2)
        if assigned is not None and torch.equal(nearest, assigned):
            break
        assigned = nearest
        members = F.one_hot(nearest, centres.shape[1]).to(points.dtype).transpose(1, 2)  # (starts, k, n)
        sizes = members.sum(2, keepdim=True)
        centres = torch.where(sizes > 0, members @ points / sizes.clamp(min=1), centres)
    distances = torch.cdist(points.expand(len(centres), -1, -1), centres).amin(2)
    return centres, distances.square().sum(1)


def k_means(points: Tensor, k: int, starts: int = 10) -> Tensor:
    """``k`` centres (k, d) of ``points`` (n, d): the best of several runs of ``lloyd`` from k-means++ starts.

    Arthur and Vassilvitskii, SODA 2007: each next centre is a point drawn in proportion to its squared distance from
    the nearest centre so far. Draws from torch's global generator, by hand: which of them ``torch.multinomial`` takes
    differs between versions of torch. Fewer than ``k`` distinct points give equal centres.
    """
    first = torch.randint(len(points), (starts, 1))
    centres = points[first]
    for _ in range(k - 1):
        distances = torch.cdist(points.expand(starts, -1, -1), centres).amin(2).square()
        distances = distances + torch.finfo(points.dtype).tiny  # where all points are centres already, any will do
        reached = distances.cumsum(1)
        drawn = torch.searchsorted(reached, torch.rand(starts, 1, dtype=points.dtype) * reached[:, -1:], right=True)
        centres = torch.cat([centres, points[drawn.clamp(max=len(points) - 1)]], dim=1)
    centres, costs = lloyd(points, centres)
    return centres[costs.argmin()]


@dataclass(frozen=True)
class LocalSimilarity(Method):
    """Base of methods that classify with ``heads.Proxies``; a subclass answers ``loss``.

    A task's new proxies are imprinted and trained with the backbone while the old ones stand still; then all proxies,
    and nothing else, are trained on equally many images of every class. In that second phase the backbone stays in
    training mode, so running statistics of norms follow the balanced rows, as they do in the authors' code.

    Attributes:
        proxies (K, section 3.2): weight vectors of each class.
        scale (η, section 3.2): factor on the similarities at the start, learned from there; the authors' 1.
        margin (δ, section 3.2): of the NCA loss. It cancels and changes nothing, see ``losses.nca``.
        balanced_epochs: length of the second phase as a part of the run's epochs; the authors' 20 of 160.
        balanced_lr: its learning rate as a factor on the run's; the authors' 0.05 of 0.1.
    """

    signed_embedding: ClassVar[bool] = True
    needs_maps: ClassVar[bool] = True
    released: ClassVar[Mapping[str, Any]] = AUTHORS_PROTOCOL

    proxies: int = 10
    scale: float = 1.0
    margin: float = 0.6
    balanced_epochs: float = 0.125
    balanced_lr: float = 0.5

    def head(self, dim: int) -> Head:
        return Proxies(dim, self.proxies, self.scale)

    def grow(self, net: Network, task: Task, new_images: Callable[[], list[Tensor]]) -> None:
        """Later tasks' proxies start as k-means centres of their classes' unit embeddings, as long as the old ones are.

        Clustered in float64 on the CPU, so the centres are the same on every device.
        """
        if not task.index:
            net.head.grow(task.new)
            return
        embeddings = new_images()
        length = net.head.weights.detach().norm(dim=1).mean()
        net.head.grow(task.new)
        centres = [k_means(F.normalize(each.double().cpu(), dim=1), self.proxies) for each in embeddings]
        net.head.imprint(torch.cat(centres).to(length) * length)

    def phases(self, task: Task) -> tuple[Phase, ...]:
        balanced = Phase("balanced", "balanced", Tail(self.balanced_epochs, self.balanced_lr))
        return (Phase(), balanced) if task.index else (Phase(),)

    def parameters(self, net: Network, phase: Phase) -> Iterable[nn.Parameter]:
        if phase.rows == "balanced":
            yield from net.head.blocks.parameters()
        else:
            yield from net.backbone.parameters()
            yield from net.head.newest()
