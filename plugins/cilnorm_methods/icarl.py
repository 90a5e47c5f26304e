"""iCaRL: every class is a yes or no, old ones as the teacher says; the class with the nearest mean of exemplars wins.

    bce:      L = Σ_new BCE(σ(z_c), [c = y]) / C + Σ_old BCE(σ(z_c), σ(z_c°)) / C,   mean over rows
    softmax:  L = CE(z, y) + KD(z_old classes)

Rebuffi et al., "iCaRL: Incremental Classifier and Representation Learning", CVPR 2017,
https://arxiv.org/abs/1611.07725, algorithms 1 to 5. ``bce`` is the paper's objective: what a row is of old classes the
teacher says, of stored images as well. ``softmax`` is PyCIL's. To predict as in the paper, runs ask for
``classifier: nme``, as every preset of ours does for this method.
``released`` is the authors' code: the embedding has no last ReLU, exemplars are found by another greedy rule, and a
class may keep one image more. In it all C classes of the stream have an output from the start, and those of classes to
come learn 0; here they come with their class. C counts them all the same, since the authors' learning rate of 2 belongs
to that mean. Its nearest means always count mirror images; here they do where training mirrors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cilnorm import hookspecs
from cilnorm.losses import soft_cross_entropy
from cilnorm.method import AUTHORS_PROTOCOL, Method, Step


@dataclass(frozen=True)
class ICaRL(Method):
    """Classification and distillation, and a representation for the nearest mean of exemplars.

    Attributes:
        objective (section 2.3): ``bce``, the paper's; or ``softmax``, PyCIL's.
        divisor: C, by which ``bce`` divides the sum over classes: ``all`` of the stream, or those ``seen``.
        temperature (τ): of the distillation's softmax in ``softmax``.
        last_relu: whether the embedding is behind the backbone's last ReLU; the authors' code: no.
    """

    released: ClassVar[Mapping[str, Any]] = {**AUTHORS_PROTOCOL, "last_relu": False, "protocol.budget": "ceil"}
    pycil: ClassVar[Mapping[str, Any]] = {"objective": "softmax"}

    objective: Literal["bce", "softmax"] = "bce"
    divisor: Literal["all", "seen"] = "all"
    temperature: float = 2.0
    last_relu: bool = True

    @property
    def signed_embedding(self) -> bool:
        return not self.last_relu

    def loss(self, step: Step) -> dict[str, Tensor]:
        return self._softmax(step) if self.objective == "softmax" else self._bce(step)

    def _bce(self, step: Step) -> dict[str, Tensor]:
        logits, targets, task = step.out.logits, step.batch.targets, step.task
        true = (targets.unsqueeze(1) == torch.arange(logits.shape[1], device=logits.device)).to(logits)
        classes = sum(task.sizes) if self.divisor == "all" else task.seen
        new = F.binary_cross_entropy_with_logits(logits[:, task.old :], true[:, task.old :], reduction="sum")
        terms = {"bce": new / (len(targets) * classes)}
        if step.old is not None:
            said = step.old.logits[:, : task.old].sigmoid()
            old = F.binary_cross_entropy_with_logits(logits[:, : task.old], said, reduction="sum")
            terms["distill"] = old / (len(targets) * classes)
        return terms

    def _softmax(self, step: Step) -> dict[str, Tensor]:
        terms = {"ce": F.cross_entropy(step.out.logits, step.batch.targets)}
        if step.old is not None:
            new, old = step.out.logits[:, : step.task.old], step.old.logits
            terms["distill"] = soft_cross_entropy(new, old, self.temperature)
        return terms


@hookspecs.hookimpl
def cilnorm_methods() -> list[hookspecs.Method]:
    return [hookspecs.Method("icarl", ICaRL, "https://arxiv.org/abs/1611.07725")]
