"""AFC: channels of the stage maps that mattered for the loss of past tasks must not change much.

    L = L_NCA + λ √(seen / new) mean_l,n,c ω_lc ‖ψ(map)_lnc − ψ(old map)_lnc‖,   ω_lc ∝ E Σ_hw (∂L/∂map_lc)²

Kang et al., "Class-Incremental Learning by Knowledge Distillation with Adaptive Feature Consolidation", CVPR 2022,
https://arxiv.org/abs/2204.00895, section 3. Classifier, its start and both phases are those of PODNet, as in the paper.
Follows the authors' code, which distils nothing at the embedding: its importance is measured there and never used.
Different here: the pass that measures importance runs in training mode, on batch statistics, as the authors' code does,
but on a copy, so it does not move the network's running statistics. In the authors' code it does, and since it comes
last, a network is tested, and teaches, with the statistics of that pass over all current and stored images;
``measure_in_place`` does so, and ``released`` sets it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from cilnorm import hookspecs
from cilnorm.batch import Batch, Task
from cilnorm.losses import channel_importance, nca, weighted_map_distance
from cilnorm.method import Past, Step
from cilnorm.network import Network
from cilnorm.telling import tell_batch
from cilnorm_methods._local_similarity import LocalSimilarity


@dataclass(frozen=True)
class AFC(LocalSimilarity):
    """Local similarity classifier, maps held by importance.

    Attributes:
        consolidation (λ): weight of the term that keeps important channels; authors' options for CIFAR-100; 10 on
            ImageNet.
        measure_in_place: whether the pass that measures importance moves running statistics; authors: yes.
    """

    released: ClassVar[Mapping[str, Any]] = {**LocalSimilarity.released, "measure_in_place": True}
    measures_means: ClassVar[bool] = True

    consolidation: float = 4.0
    measure_in_place: bool = False

    def loss(self, step: Step) -> dict[str, Tensor]:
        terms = {"nca": nca(step.out.logits, step.batch.targets, self.margin)}
        if step.old is not None and step.past is not None:
            weights = [step.past.tensors[f"importance-{stage}"] for stage in range(len(step.out.maps))]
            strength = self.consolidation * math.sqrt(step.task.seen / step.task.new)
            terms["importance-weighted"] = strength * weighted_map_distance(step.out.maps, step.old.maps, weights)
        return terms

    def remember(self, net: Network, task: Task, batches: Callable[[], Iterable[Batch]]) -> Past:
        """A frozen copy, and for every stage the channels' importance (C,), 1 on average.

        With ``measure_in_place`` the network itself goes through the batches, in training mode, before it is copied.
        """
        measured = (net if self.measure_in_place else copy.deepcopy(net)).train().requires_grad_()
        sums: list[Tensor] = []
        for batch in batches():
            measured.observe(batch.composition)
            tell_batch(measured, batch, task)
            out = measured(batch.images)
            gradients = torch.autograd.grad(nca(out.logits, batch.targets, self.margin), out.maps)
            # Of a part of the rows, gradients are as many times larger as there are parts; the factor cancels below.
            added = [batch.mean(channel_importance(gradient)) for gradient in gradients]
            sums = [a + b for a, b in zip(sums, added, strict=True)] if sums else added
        teacher = Past(copy.deepcopy(net).eval().requires_grad_(False))
        return replace(teacher, tensors={f"importance-{stage}": s / s.mean() for stage, s in enumerate(sums)})


@hookspecs.hookimpl
def cilnorm_methods() -> list[hookspecs.Method]:
    return [hookspecs.Method("afc", AFC, "https://arxiv.org/abs/2204.00895")]
