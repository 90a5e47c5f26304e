"""ER-ACE: new classes are learned without a push against old ones; only a buffer of all classes has them all compete.

    L = CE(z over the classes of the current rows, y; current rows) + CE(z, y; buffer),   a mean over each

Caccia et al., "New Insights on Reducing Abrupt Representation Change in Online Continual Learning", ICLR 2022,
https://arxiv.org/abs/2104.05025, section 4. The paper learns online: current rows and rows of a buffer, which holds
images of the current task as well, go through the network one after the other, each by themselves. Here they are one
batch and one pass, which moves none of the terms but what norms make of the rows. And stored images are of old classes
alone here, so the buffer is both kinds of rows in the shares that it comes to hold of them: n new of n + m classes,

    CE(z, y; buffer) = n / (n+m) CE(z, y; current rows) + m / (n+m) CE(z, y; past rows)

Were it past rows alone (``buffer: past``), nothing would ever set new classes against old ones: every task then ends
near 0 % when it is new. ``released`` is the authors' code: a cosine classifier, and the highest class met so far is
never masked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cilnorm import hookspecs
from cilnorm.batch import Batch, Task
from cilnorm.heads import FixedCosine, Head, Linear
from cilnorm.losses import mean_over
from cilnorm.method import AUTHORS_PROTOCOL, Method, Past, Step
from cilnorm.network import Network

CLOSED = -1e9  # the logit of a class that does not compete


@dataclass(frozen=True)
class ERACE(Method):
    """Asymmetric cross-entropy; no teacher.

    Attributes:
        competing (C_curr, section 4): with whom the classes of current rows compete: the classes of the same ``batch``,
            or all of the ``task``.
        mask_first_task: whether it is so in the first task, too; Mammoth's code: no, all classes compete there.
        highest: whether the highest class met so far competes always, as in the authors' code and Mammoth's. Here that
            is the task's last class; there it is one that comes before while the task's first batches are met.
        buffer: rows of the second term: of all classes ``seen``, as in the paper, or ``past`` ones alone.
        cosine: whether the classifier compares directions, as the authors' and Mammoth's does for this method.
        scale: factor on its cosines.
    """

    released: ClassVar[Mapping[str, Any]] = {
        **AUTHORS_PROTOCOL, "protocol.herding": "greedy", "highest": True, "cosine": True,
    }  # fmt: skip

    competing: Literal["batch", "task"] = "batch"
    mask_first_task: bool = True
    highest: bool = False
    buffer: Literal["seen", "past"] = "seen"
    cosine: bool = False
    scale: float = 10.0

    def head(self, dim: int) -> Head:
        return FixedCosine(dim, self.scale) if self.cosine else Linear(dim)

    def loss(self, step: Step) -> dict[str, Tensor]:
        logits, targets = step.out.logits, step.batch.targets
        current = targets >= step.task.old
        masked = logits.masked_fill(~self._competing(logits, targets, step.task), CLOSED)
        terms = {"ce-current": mean_over(F.cross_entropy(masked, targets, reduction="none"), current)}
        if step.task.index:
            each = F.cross_entropy(logits, targets, reduction="none")
            share = step.task.old / step.task.seen if self.buffer == "seen" else 1.0
            terms["ce-buffer"] = share * mean_over(each, ~current) + (1 - share) * mean_over(each, current)
        return terms

    def _competing(self, logits: Tensor, targets: Tensor, task: Task) -> Tensor:
        """Whether each class (classes,) competes for the current rows."""
        classes = torch.arange(logits.shape[1], device=logits.device)
        if not (task.index or self.mask_first_task):
            return classes >= 0
        if self.competing == "task":
            return classes >= task.old
        present = (targets.unsqueeze(1) == classes).any(0) & (classes >= task.old)
        return present | (classes >= task.seen - 1) if self.highest else present

    def remember(self, net: Network, task: Task, batches: Callable[[], Iterable[Batch]]) -> Past | None:
        return None


@hookspecs.hookimpl
def cilnorm_methods() -> list[hookspecs.Method]:
    return [hookspecs.Method("er-ace", ERACE, "https://arxiv.org/abs/2104.05025", ("er_ace", "erace"))]
