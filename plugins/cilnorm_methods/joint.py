"""Joint training: at every task the network goes on learning from all training images of all tasks so far.

What a method with a memory is measured against, and no method itself: it keeps every image. Cross-entropy over all seen
classes, as in fine-tuning; its first task has the bits of fine-tuning's. An epoch is one pass over all those images, so
later tasks take more steps. The network goes on from the last task, as in FACIL (https://arxiv.org/abs/2010.15277); one
that learns all classes at once is a run of one task (``--tasks 1``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from cilnorm import hookspecs
from cilnorm.batch import Batch, Task
from cilnorm.method import Method, Past, Phase, Step
from cilnorm.network import Network


@dataclass(frozen=True)
class Joint(Method):
    """Cross-entropy over all seen classes on all images seen."""

    exemplar_free: ClassVar[bool] = True

    def phases(self, task: Task) -> tuple[Phase, ...]:
        return (Phase(rows="seen" if task.index else "mixed"),)

    def loss(self, step: Step) -> dict[str, Tensor]:
        return {"ce": F.cross_entropy(step.out.logits, step.batch.targets)}

    def remember(self, net: Network, task: Task, batches: Callable[[], Iterable[Batch]]) -> Past | None:
        return None


@hookspecs.hookimpl
def cilnorm_methods() -> list[hookspecs.Method]:
    return [hookspecs.Method("joint", Joint, "https://arxiv.org/abs/2010.15277", ("upper-bound",))]
