"""WA: weights of new classes are made as long as those of old ones once a task is trained.

    L = (1 − λ) CE(z, y) + λ KD(z_old classes),   λ = old / seen
    w_new ← γ w_new,   γ = mean ‖w_old‖ / mean ‖w_new‖

Zhao et al., "Maintaining Discrimination and Fairness in Class Incremental Learning", CVPR 2020,
https://arxiv.org/abs/1911.07053, sections 3 and 4. KD is the cross-entropy between softened outputs, without a factor
τ². The aligned network is tested, teaches, and is what the next task starts from. That norms and logits go together
needs weights that are nowhere negative and no bias, so the paper clips weights at 0 after each step and has no bias;
PyCIL has a bias, which it does not align, and clips nothing (``pycil``). It also aligns twice, to the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from cilnorm import hookspecs
from cilnorm.batch import Batch, Task
from cilnorm.heads import Head, Linear, align
from cilnorm.losses import shared_distillation
from cilnorm.method import AUTHORS_PROTOCOL, Method, Past, Step
from cilnorm.network import Network


@dataclass(frozen=True)
class WA(Method):
    """Distillation whose weight grows with the old classes, and weight alignment.

    Attributes:
        temperature (τ): of the distillation's softmax.
        bias: whether the classifier has one; the paper: no, PyCIL: yes.
        non_negative (section 4.2): whether weights below 0 are set to 0 after each step; PyCIL: no.
    """

    released: ClassVar[Mapping[str, Any]] = {**AUTHORS_PROTOCOL, "protocol.herding": "greedy"}
    pycil: ClassVar[Mapping[str, Any]] = {"bias": True, "non_negative": False}

    temperature: float = 2.0
    bias: bool = False
    non_negative: bool = True

    def head(self, dim: int) -> Head:
        return Linear(dim, self.bias, self.non_negative)

    def loss(self, step: Step) -> dict[str, Tensor]:
        old = step.old.logits if step.old else None
        return shared_distillation(step.out.logits, step.batch.targets, old, self.temperature)

    def remember(self, net: Network, task: Task, batches: Callable[[], Iterable[Batch]]) -> Past | None:
        """Aligns the network, then copies it."""
        if task.index:
            weights = net.head.weights.detach()
            align(weights, task.old)
            net.head.imprint(weights[task.old :])
        return super().remember(net, task, batches)


@hookspecs.hookimpl
def cilnorm_methods() -> list[hookspecs.Method]:
    return [hookspecs.Method("wa", WA, "https://arxiv.org/abs/1911.07053")]
