"""Fine-tuning with exemplars: cross-entropy over every class seen, and nothing against forgetting but the memory.

The baseline "FT" of Cha et al., CVPR 2023 (https://arxiv.org/abs/2201.12559), section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from cilnorm import hookspecs
from cilnorm.batch import Batch, Task
from cilnorm.method import Method, Past, Step
from cilnorm.network import Network


@dataclass(frozen=True)
class FineTuning(Method):
    """Cross-entropy over all seen classes on the mixed batch."""

    exemplar_free: ClassVar[bool] = True

    def loss(self, step: Step) -> dict[str, Tensor]:
        return {"ce": F.cross_entropy(step.out.logits, step.batch.targets)}

    def remember(self, net: Network, task: Task, batches: Callable[[], Iterable[Batch]]) -> Past | None:
        return None


@hookspecs.hookimpl
def cilnorm_methods() -> list[hookspecs.Method]:
    return [hookspecs.Method("ft", FineTuning, "https://arxiv.org/abs/2201.12559", ("finetuning", "fine-tuning"))]
