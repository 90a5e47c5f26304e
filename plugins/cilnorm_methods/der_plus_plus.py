"""DER++: stored images keep the logits that they had when they were stored. Dark experience replay, not the other DER.

    L = CE(z, y; current rows) + α mean (z − z̃)² over some past rows + β CE(z, y; the other past rows)

Buzzega et al., "Dark Experience for General Continual Learning: a Strong, Simple Baseline", NeurIPS 2020,
https://arxiv.org/abs/2004.07211, algorithm 2; z̃ are the stored logits. The paper learns online: a reservoir takes in
images as they come, with the logits of that training pass; current rows and two draws from it go through the network
one after the other. Here exemplars are chosen when their task ends, z̃ is what the network then says of the image as
it is, and all rows are one batch and one pass. In the paper all outputs exist from the start; here those that came
after an image was stored have no z̃, and add nothing to the mean over all outputs of the sequence.
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
from cilnorm.losses import mean_over
from cilnorm.method import AUTHORS_PROTOCOL, Method, Past, Step
from cilnorm.network import Network, Output


@dataclass(frozen=True)
class DERPlusPlus(Method):
    """Replay of labels and of logits; no teacher.

    Attributes:
        logits (α, section 3.2): weight of the distance from stored logits; the authors' for CIFAR-100.
        labels (β, section 3.2): weight of the cross-entropy of stored images; likewise.
        draws: of past rows for the two terms: the first ``half`` for one, the second for the other, independent as the
            paper's two draws; or the ``same``, all for both.
        outputs: over which the mean of the distance goes: ``all`` of the sequence, for which the authors chose α; or
            those that have a z̃, ``stored``, by which it weighs ten times as much in the second of ten tasks.
    """

    released: ClassVar[Mapping[str, Any]] = {**AUTHORS_PROTOCOL, "protocol.herding": "greedy"}

    logits: float = 0.3
    labels: float = 0.5
    draws: Literal["half", "same"] = "half"
    outputs: Literal["all", "stored"] = "all"

    def store(self, out: Output) -> Mapping[str, Tensor]:
        return {"logits": out.logits}

    def loss(self, step: Step) -> dict[str, Tensor]:
        logits, targets = step.out.logits, step.batch.targets
        ce = F.cross_entropy(logits, targets, reduction="none")
        past = targets < step.task.old
        terms = {"ce": mean_over(ce, ~past)}
        if not step.task.index:
            return terms
        first, second = self._parts(past)
        stored = step.batch.stored["logits"]
        known = first.unsqueeze(1) & ~stored.isnan()
        squares = (logits[:, : stored.shape[1]] - stored.nan_to_num()).square()
        count = first.sum() * sum(step.task.sizes) if self.outputs == "all" else known.sum()
        terms["mse"] = self.logits * torch.where(known, squares, 0.0).sum() / count.clamp(min=1)
        terms["ce-past"] = self.labels * mean_over(ce, second)
        return terms

    def _parts(self, past: Tensor) -> tuple[Tensor, Tensor]:
        """The past rows of either term, (N,) each."""
        if self.draws == "same":
            return past, past
        first = past & (2 * past.cumsum(0) <= past.sum())
        return first, past & ~first

    def remember(self, net: Network, task: Task, batches: Callable[[], Iterable[Batch]]) -> Past | None:
        return None


@hookspecs.hookimpl
def cilnorm_methods() -> list[hookspecs.Method]:
    return [hookspecs.Method("der++", DERPlusPlus, "https://arxiv.org/abs/2004.07211", ("derpp",))]
