"""PODNet: pooled outputs of every stage, and the embedding, stay near what they were.

    L = L_NCA + λ_c √(seen / new) POD-spatial(maps, old maps) + λ_f √(seen / new) POD-flat(f, f_old)

Douillard et al., "PODNet: Pooled Outputs Distillation for Small-Tasks Incremental Learning", ECCV 2020,
https://arxiv.org/abs/2004.13513, section 3. Follows the authors' code where it departs from the paper: the NCA loss has
no hinge and its margin cancels (see ``losses.nca``), and √(seen / new) counts the new classes among the seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from cilnorm import hookspecs
from cilnorm.losses import cosine_distance, nca, pod
from cilnorm.method import Step
from cilnorm_methods._local_similarity import LocalSimilarity


@dataclass(frozen=True)
class PODNet(LocalSimilarity):
    """Local similarity classifier, POD-spatial and POD-flat.

    Attributes:
        spatial (λ_c, section 3.1): weight of POD-spatial, on the outputs of every stage; authors' options for
            CIFAR-100; 8 on ImageNet.
        flat (λ_f, section 3.1): weight of POD-flat, on the embedding; likewise; 10 on ImageNet.
    """

    spatial: float = 3.0
    flat: float = 1.0

    def loss(self, step: Step) -> dict[str, Tensor]:
        terms = {"nca": nca(step.out.logits, step.batch.targets, self.margin)}
        if step.old is not None:
            strength = math.sqrt(step.task.seen / step.task.new)
            terms["pod-spatial"] = self.spatial * strength * pod(step.out.maps, step.old.maps)
            terms["pod-flat"] = self.flat * strength * cosine_distance(step.out.embedding, step.old.embedding)
        return terms


@hookspecs.hookimpl
def cilnorm_methods() -> list[hookspecs.Method]:
    return [hookspecs.Method("podnet", PODNet, "https://arxiv.org/abs/2004.13513")]
