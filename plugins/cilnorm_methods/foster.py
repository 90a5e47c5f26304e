"""FOSTER: a new extractor learns what the old one misses; then both are compressed into a student, the next old one.

    boosting       L = CE(W [φ_o, φ_n] / ω₁, y) + CE(F φ_n, y) + λ KD(W [φ_o, φ_n] of old classes, O φ_o)
    compression    L = CE(z_s / τ, q),   q ∝ ω₂ softmax(W [φ_o, φ_n] / τ), with no label
    ω_c ∝ (1 − β) / (1 − β^N_c), 1 on average; N_c images of class c are trained on

Wang et al., "FOSTER: Feature Boosting and Compression for Class-Incremental Learning", ECCV 2022,
https://arxiv.org/abs/2204.04662. KD has no factor τ²; φ_o and O stand still; the student starts as they are. Tables mix
the ``teacher`` (both branches), whose curves the authors log, with the ``student``, the paper's one backbone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor, nn
from torch.nn import functional as F

from cilnorm import hookspecs
from cilnorm.batch import Batch, Task
from cilnorm.growing import ExpandableBackbone, Start
from cilnorm.losses import soft_cross_entropy
from cilnorm.method import AUTHORS_PROTOCOL, Method, Past, Phase, Step, Tail
from cilnorm.network import Network
from cilnorm_methods._boosting import BoostedHead, BoostedNetwork, View, class_weights


@dataclass(frozen=True)
class FOSTER(Method):
    """Feature boosting, then compression.

    Attributes:
        distillation (λ, section 4.2): weight of the term that keeps what old classes got.
        temperature (τ): of both distillations.
        boosting_beta (β₁): one value a task from the second on, the last one for all others too.
        compression_beta (β₂): the same in compression, for all tasks.
        compression_epochs: its length as a part of the run's epochs; authors: 130 of 170.
        compression_decay: its weight decay.
        extractor: a new one's weights at the start: a copy of the old one's, or fresh ones.
        scored: which network fills the accuracy matrix; the other one's is beside it.
        herded: by whose embedding exemplars are chosen.
    """

    released: ClassVar = {**AUTHORS_PROTOCOL, "scored": "teacher"}
    pycil: ClassVar = {"scored": "teacher"}

    distillation: float = 1.0
    temperature: float = 2.0
    boosting_beta: tuple[float, ...] = (0.96,)
    compression_beta: float = 0.97
    compression_epochs: float = 130 / 170
    compression_decay: float = 0.0
    extractor: Start = "copy"
    scored: View = "student"
    herded: View = "teacher"

    def head(self, dim: int) -> BoostedHead:
        return BoostedHead(dim)

    def network(self, build: Callable[[], nn.Module]) -> Network:
        backbone = ExpandableBackbone(build, self.extractor)
        return BoostedNetwork(backbone, self.head(backbone.dim), self.scored)

    def phases(self, task: Task) -> tuple[Phase, ...]:
        if not task.index:
            return (Phase(),)
        tail = Tail(self.compression_epochs, 1.0, (), "cosine-at-once", self.compression_decay)
        return Phase("boosting", view="teacher"), Phase("compression", schedule=tail, view="compression")

    def parameters(self, net: Network, phase: Phase) -> Iterable[nn.Parameter]:
        return cast(BoostedNetwork, net).learning(phase.view)

    def loss(self, step: Step) -> dict[str, Tensor]:
        logits, targets, task = step.out.logits, step.batch.targets, step.task
        if not task.index:
            return {"ce": F.cross_entropy(logits, targets)}
        head = cast(Any, step.net.head)
        if step.phase.name == "compression":
            weights = class_weights(task.images, self.compression_beta, logits)
            wanted = (head.wide(step.out.embedding.detach()[:, : 2 * head.dim]) / self.temperature).softmax(1) * weights
            wanted = wanted / wanted.sum(1, keepdim=True)
            return {"balanced-distill": F.cross_entropy(logits / self.temperature, wanted)}
        old, new = step.out.embedding.split(head.dim, dim=1)
        beta = self.boosting_beta[min(task.index, len(self.boosting_beta)) - 1]
        return {
            "ce": F.cross_entropy(logits / class_weights(task.images, beta, logits), targets),
            "feature-ce": F.cross_entropy(head.feature(new), targets),
            "distill": self.distillation * soft_cross_entropy(logits[:, : task.old], head.old(old), self.temperature),
        }

    def remember(self, net: Network, task: Task, batches: Callable[[], Iterable[Batch]]) -> Past | None:
        net.look(self.herded)  # for the choice of exemplars, which comes next
        return None


@hookspecs.hookimpl
def cilnorm_methods() -> list[hookspecs.Method]:
    return [hookspecs.Method("foster", FOSTER, "https://arxiv.org/abs/2204.04662")]
