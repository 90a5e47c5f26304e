"""SS-IL: old and new classes never compete in one softmax, and each old task is distilled on its own.

    L = (Σ_current CE(z_new, y) + Σ_past CE(z_old, y)) / N + Σ_k τ² KL(softmax(z_k^old / τ) || softmax(z_k / τ))

z_new are the logits of the newest task, z_old those of all old ones, z_k those of old task k. Ahn et al., "SS-IL:
Separated Softmax for Incremental Learning", ICCV 2021, https://arxiv.org/abs/2003.13947, in the form of the
authors' code. ``released`` is the TBBN experiments' port, which keeps the newest old task's distillation term alone,
since every pass of its loop writes to the same place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cilnorm import hookspecs
from cilnorm.losses import distill
from cilnorm.method import Method, Step


@dataclass(frozen=True)
class SSIL(Method):
    """Separated softmax and task-wise distillation.

    Attributes:
        temperature (τ): of the distillation's softmax, as in the authors' code.
        distilled: which old tasks are distilled.
    """

    released: ClassVar[Mapping[str, Any]] = {"distilled": "newest"}

    temperature: float = 2.0
    distilled: Literal["every", "newest"] = "every"

    def loss(self, step: Step) -> dict[str, Tensor]:
        logits, targets, task = step.out.logits, step.batch.targets, step.task
        if step.old is None:
            return {"ce": F.cross_entropy(logits, targets)}
        current, past, old = step.batch.current, step.batch.past, task.old
        new_classes = F.cross_entropy(logits[current, old:], targets[current] - old, reduction="sum")
        old_classes = F.cross_entropy(logits[past, :old], targets[past], reduction="sum")
        tasks = range(task.index) if self.distilled == "every" else [task.index - 1]
        columns = [task.classes(index) for index in tasks]
        taskwise = [distill(logits[:, k], step.old.logits[:, k], self.temperature) for k in columns]
        return {
            "separated-ce": (new_classes + old_classes) / len(targets),
            "taskwise-distill": torch.stack(taskwise).sum(),
        }


@hookspecs.hookimpl
def cilnorm_methods() -> list[hookspecs.Method]:
    return [hookspecs.Method("ssil", SSIL, "https://arxiv.org/abs/2003.13947", ("ss-il",))]
