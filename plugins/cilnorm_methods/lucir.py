"""LUCIR: unit embeddings and weights, so that new classes can't outgrow old ones, and embeddings keep their direction.

    L = CE(σ cos(f, w)) + λ √(old / new) (1 − cos(f, f_old)) + Σ_k max(0, m − cos(f, w_true) + cos(f, w_new(k)))

Hou et al., "Learning a Unified Classifier Incrementally via Rebalancing", CVPR 2019, section 3.5,
https://doi.org/10.1109/CVPR.2019.00092.
The ranking term is averaged over k, as in the released code of both the authors and FACIL. Followed from the authors'
code beyond the paper: the weights of new classes are imprinted, and old ones stand still. ``released`` is the TBBN
experiments' version, which stems from FACIL: no imprinting, and current rows drawn from current and memory images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cilnorm import hookspecs
from cilnorm.batch import Task
from cilnorm.heads import Cosine, Head
from cilnorm.losses import cosine_distance, margin_ranking
from cilnorm.method import Method, Phase, Step, Tail
from cilnorm.network import Network


@dataclass(frozen=True)
class LUCIR(Method):
    """Cosine classifier, less-forget constraint, inter-class separation.

    Attributes:
        less_forget (λ_base, section 4.1): weight of the term that keeps embeddings in their direction; it grows with
            √(old / new) classes. 10 on ImageNet.
        rank (section 3.5): weight of the term that separates old classes from new ones; the paper gives it none.
        rank_margin (m, section 4.1): by how much an old class must be nearer than a new one.
        rank_k (K, section 4.1): how many of the nearest new classes are pushed away.
        scale (σ): factor on the cosines at the start, learned from there; the authors' code.
        imprint: whether weights of new classes start at their mean embedding; the authors' code.
        balanced_epochs: length of a last phase on equally many images of every class as a part of the run's epochs, 0
            for none; the authors' ImageNet script: 20 of 90, so 0.22.
        balanced_lr: its learning rate as a factor on the run's.
    """

    signed_embedding: ClassVar[bool] = True  # section 3.2: without the last ReLU angles use the whole circle
    exemplar_free: ClassVar[bool] = True  # but for a balanced phase, which ``memory: 0`` then refuses
    released: ClassVar[Mapping[str, Any]] = {"imprint": False, "protocol.current_rows": "union"}

    less_forget: float = 5.0
    rank: float = 1.0
    rank_margin: float = 0.5
    rank_k: int = 2
    scale: float = 1.0
    imprint: bool = True
    balanced_epochs: float = 0.0
    balanced_lr: float = 0.1

    def head(self, dim: int) -> Head:
        return Cosine(dim, self.scale)

    def grow(self, net: Network, task: Task, new_images: Callable[[], list[Tensor]]) -> None:
        """New weights start along the mean direction of their class, as long as the old ones are on average."""
        if not (self.imprint and task.index):
            net.head.grow(task.new)
            return
        means = torch.stack([F.normalize(images, dim=1).mean(0) for images in new_images()])
        length = net.head.weights.detach().norm(dim=1).mean()
        net.head.grow(task.new)
        net.head.imprint(length * F.normalize(means, dim=1))

    def phases(self, task: Task) -> tuple[Phase, ...]:
        if not (self.balanced_epochs and task.index):
            return (Phase(),)
        tail = Tail(self.balanced_epochs, self.balanced_lr, milestones=(0.5,))
        return Phase(), Phase("balanced", "balanced", tail, backbone="eval")

    def parameters(self, net: Network, phase: Phase) -> Iterable[nn.Parameter]:
        if phase.name == "balanced":
            return net.head.parameters()
        return [*net.backbone.parameters(), *net.head.newest()]

    def loss(self, step: Step) -> dict[str, Tensor]:
        scores, targets, task = step.out.scores, step.batch.targets, step.task
        terms = {"ce": F.cross_entropy(step.out.logits, targets)}
        if step.old is not None:
            strength = self.less_forget * math.sqrt(task.old / task.new)
            terms["less-forget"] = strength * cosine_distance(step.out.embedding, step.old.embedding)
            ranking = margin_ranking(scores, targets, task.old, self.rank_k, self.rank_margin)
            terms["rank"] = self.rank * ranking
        return terms


@hookspecs.hookimpl
def cilnorm_methods() -> list[hookspecs.Method]:
    return [hookspecs.Method("lucir", LUCIR, "https://doi.org/10.1109/CVPR.2019.00092", ("ucir",))]
