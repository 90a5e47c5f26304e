"""BiC: two numbers a task correct its logits, learned on images that were held out of the training.

    main:  L = (1 − λ) CE(z', y) + λ KD(z' of old classes),   λ = old / seen,   z'_c = α_k z_c + β_k, c in task k
    bias:  L = CE(z', y) on held-out images, as many of every class; α and β of the newest task move, nothing else

Wu et al., "Large Scale Incremental Learning", CVPR 2019, https://arxiv.org/abs/1905.13260, sections 3 and 4. KD is the
cross-entropy between softened outputs, without a factor τ²; the teacher's logits are corrected ones. A tenth of every
old class' exemplars, at least one, and as many images of each new class are held out, drawn anew in each task.
``released`` is the authors' code as far as it is options here: theirs holds out before it trains on, lets weight decay
shrink from task to task and keeps norms out of it, and does not augment held-out images. ``pycil`` is PyCIL's port: its
second phase takes the softmax twice, which pushes α of a well-learned task below 0 and its accuracy to 0, lets weight
decay pull α to 0, and leaves the network with running statistics of the held-out images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor, nn
from torch.nn import functional as F

from cilnorm import hookspecs
from cilnorm.batch import Task
from cilnorm.heads import BiasCorrected, Head
from cilnorm.losses import shared_distillation
from cilnorm.method import AUTHORS_PROTOCOL, Method, Mode, Phase, Step, Tail
from cilnorm.network import Network


@dataclass(frozen=True)
class BiC(Method):
    """Distillation, then bias correction on held-out images.

    Attributes:
        temperature (T, section 3): of the distillation's softmax.
        held_out (section 4): part of every old class' exemplars that the main phase leaves to the second; the paper's
            split is 9 to 1.
        correction_epochs: length of the second phase as a part of the run's epochs; the authors' code: 2.
        correction_lr: learning rate of the second phase as a part of the run's; the authors': all of it.
        correction_norms: mode of the backbone in the second phase, see ``cilnorm.method.Phase``; the authors' code:
            ``batch``, PyCIL: ``train``; others: ``eval``.
        beta_penalty: weight of β² / 2 in the second phase; the authors' code: 0.1.
        decay_correction: whether the run's weight decay pulls at α and β; PyCIL: yes.
        double_softmax: whether cross-entropy is given softmax(z') in place of z' in the second phase; PyCIL: yes.
    """

    released: ClassVar[Mapping[str, Any]] = {
        **AUTHORS_PROTOCOL, "protocol.herding": "greedy", "correction_epochs": 2.0, "beta_penalty": 0.1,
    }  # fmt: skip
    pycil: ClassVar[Mapping[str, Any]] = {"correction_norms": "train", "decay_correction": True, "double_softmax": True}

    temperature: float = 2.0
    held_out: float = 0.1
    correction_epochs: float = 1.0
    correction_lr: float = 1.0
    correction_norms: Mode = "batch"
    beta_penalty: float = 0.0
    decay_correction: bool = False
    double_softmax: bool = False

    def head(self, dim: int) -> Head:
        return BiasCorrected(dim, self.decay_correction)

    def phases(self, task: Task) -> tuple[Phase, ...]:
        if not task.index:
            return (Phase(),)
        # As long as the main phase, at its rate, it is like that one; else the rate falls where the paper's does, at
        # 100, 150 and 200 of 250.
        alike = self.correction_epochs == self.correction_lr == 1
        schedule = None if alike else Tail(self.correction_epochs, self.correction_lr, (0.4, 0.6, 0.8))
        bias = Phase("bias", "held-out", schedule, self.correction_norms, held_out=self.held_out)
        return Phase(held_out=self.held_out), bias

    def parameters(self, net: Network, phase: Phase) -> Iterable[nn.Parameter]:
        head = cast(BiasCorrected, net.head)
        if phase.name == "bias":
            return head.corrections[-1].parameters()
        return [*net.backbone.parameters(), *head.blocks.parameters()]

    def loss(self, step: Step) -> dict[str, Tensor]:
        return self._correction(step) if step.phase.name == "bias" else self._main(step)

    def _main(self, step: Step) -> dict[str, Tensor]:
        old = step.old.logits if step.old else None
        return shared_distillation(step.out.logits, step.batch.targets, old, self.temperature)

    def _correction(self, step: Step) -> dict[str, Tensor]:
        logits = step.out.logits.softmax(1) if self.double_softmax else step.out.logits
        terms = {"ce": F.cross_entropy(logits, step.batch.targets)}
        if self.beta_penalty:
            newest = cast(BiasCorrected, step.net.head).corrections[-1]
            terms["beta"] = self.beta_penalty / 2 * cast(Tensor, newest.beta).square().sum()
        return terms


@hookspecs.hookimpl
def cilnorm_methods() -> list[hookspecs.Method]:
    return [hookspecs.Method("bic", BiC, "https://arxiv.org/abs/1905.13260")]
