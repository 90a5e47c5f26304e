"""EEIL: cross-entropy, distillation of every old task's outputs, and a second phase on equally many images a class.

    L = CE(z, y) + λ Σ_k BCE(softmax(z_k / τ), softmax(z_k^old / τ)),   k over the old tasks

Castro et al., "End-to-End Incremental Learning", ECCV 2018, https://arxiv.org/abs/1807.09536, section 3.2, as FACIL
(https://arxiv.org/abs/2010.15277) computes it: the distillation is element-wise and has no factor τ², and the network
before the task teaches in both phases (the paper's second phase has the network of the first distil the new classes).
``released`` is the TBBN experiments' version, in which the first phase leaves out the newest old task (there is no
distillation at all in the second task), current rows are drawn from current and memory images, and the second phase is
not balanced: it trains on mixed rows again, whose current rows come from the current images and twice the memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from cilnorm import hookspecs
from cilnorm.batch import Task
from cilnorm.losses import distill_elementwise
from cilnorm.method import Method, Phase, Rows, Step, Tail


@dataclass(frozen=True)
class EEIL(Method):
    """Cross-distilled loss, then balanced fine-tuning.

    Attributes:
        distillation (λ): weight of the distillation; the paper has no such weight, FACIL has.
        temperature (τ, section 3.2): of the distillation's softmax.
        distil_newest: whether the first phase distils the newest old task.
        balanced_epochs (section 3.3): length of the second phase as a part of the run's epochs; paper: 30 of 40; FACIL
            and the TBBN experiments: 40 of 160.
        balanced_lr (section 3.3): its learning rate as a factor on the run's; paper: a tenth; FACIL and the TBBN
            experiments: a hundredth.
        balanced_rows: what its batches hold, see ``cilnorm.method.Phase``; paper: ``balanced``; FACIL: ``even``; the
            TBBN experiments: ``doubled``.
        gradient_noise (η): noise on every gradient; paper: 0.3; FACIL and the TBBN experiments leave it out.
    """

    released: ClassVar[Mapping[str, Any]] = {
        "distil_newest": False,
        "balanced_epochs": 0.25,
        "balanced_lr": 0.01,
        "balanced_rows": "doubled",
        "protocol.current_rows": "union",
        "protocol.drop_last": True,
    }

    distillation: float = 1.0
    temperature: float = 2.0
    distil_newest: bool = True
    balanced_epochs: float = 0.75
    balanced_lr: float = 0.1
    balanced_rows: Rows = "balanced"
    gradient_noise: float = 0.0

    def phases(self, task: Task) -> tuple[Phase, ...]:
        main = Phase(gradient_noise=self.gradient_noise)
        tail = Tail(self.balanced_epochs, self.balanced_lr)
        balanced = Phase("balanced", self.balanced_rows, tail, gradient_noise=self.gradient_noise)
        return (main, balanced) if task.index else (main,)

    def loss(self, step: Step) -> dict[str, Tensor]:
        terms = {"ce": F.cross_entropy(step.out.logits, step.batch.targets)}
        newest = self.distil_newest or step.phase.name == "balanced"
        columns = [step.task.classes(index) for index in range(step.task.index - (not newest))]
        if step.old is not None and columns:
            new, old = step.out.logits, step.old.logits
            tasks = [distill_elementwise(new[:, k], old[:, k], self.temperature) for k in columns]
            terms["distill"] = self.distillation * torch.stack(tasks).sum()
        return terms


@hookspecs.hookimpl
def cilnorm_methods() -> list[hookspecs.Method]:
    return [hookspecs.Method("eeil", EEIL, "https://arxiv.org/abs/1807.09536")]
