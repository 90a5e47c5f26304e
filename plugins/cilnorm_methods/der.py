"""DER: every task brings a feature extractor of its own; the earlier ones stand still. Not Dark Experience Replay.

    L = CE(W [φ_1, ..., φ_t], y) + λ_a CE(A φ_t, y'),   y' = 0 for every old class, 1, 2, ... for the new ones
    then, from the second task on: W drawn anew and trained alone, by CE(z / δ), on as many images of every class

Yan, Xie and He, "DER: Dynamically Expandable Representation for Class Incremental Learning", CVPR 2021,
https://arxiv.org/abs/2103.16788, sections 3.2 to 3.4. The paper's channel masks were never released and are not here.
``released`` is the authors' code; ``balance: align`` is PyCIL's.
Different here: the second phase takes the new classes' exemplars, not images drawn for it, and ``warm_up`` leaves the
main phase no momentum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

from torch import Tensor, nn
from torch.nn import functional as F

from cilnorm import hookspecs
from cilnorm.batch import Batch, Task
from cilnorm.growing import ExpandableBackbone, GrowingNetwork, Start
from cilnorm.heads import Expanding, Head, align
from cilnorm.method import AUTHORS_PROTOCOL, Method, Past, Phase, Step, Tail
from cilnorm.network import Network


@dataclass(frozen=True)
class DER(Method):
    """Expandable representation with an auxiliary classifier, then a balanced classifier.

    Attributes:
        auxiliary (λ_a, section 3.2): weight of the auxiliary classifier's term.
        extractor: a new one's weights at the start: a copy of the last one's, or fresh ones.
        balance: ``retrain``: the second phase, section 3.4; ``align``: new rows scaled as in WA, as in PyCIL; ``none``.
        balanced_epochs (section 3.4): length of the second phase as a part of the run's epochs; authors: 30 of 160.
        temperature (δ, section 3.4): of the second phase's softmax.
        warm_up: part of the run's epochs, before them, in which the rate rises and after which the head is drawn anew;
            0 for none; authors: 10 of 160.
        keep_head (section 3.2): whether weights from old features to old classes go on in the next task; authors: no.
        bias: whether the classifiers have biases; authors: no.
        normal_head: whether their weights start normal, as the authors', or uniform, as PyCIL's.
    """

    released: ClassVar = {**AUTHORS_PROTOCOL, "warm_up": 0.0625, "keep_head": False, "bias": False, "normal_head": True}
    pycil: ClassVar = {"balance": "align"}

    auxiliary: float = 1.0
    extractor: Start = "copy"
    balance: Literal["retrain", "align", "none"] = "retrain"
    balanced_epochs: float = 0.1875
    temperature: float = 5.0
    warm_up: float = 0.0
    keep_head: bool = True
    bias: bool = True
    normal_head: bool = False

    def head(self, dim: int) -> Head:
        return Expanding(dim, self.keep_head, self.bias, self.normal_head)

    def network(self, build: Callable[[], nn.Module]) -> Network:
        return GrowingNetwork(backbone := ExpandableBackbone(build, self.extractor), self.head(backbone.dim))

    def phases(self, task: Task) -> tuple[Phase, ...]:
        phases = [Phase(fresh_head=bool(self.warm_up))]
        if self.warm_up:
            phases.insert(0, Phase("warm-up", schedule=Tail(self.warm_up, 1.0, annealing="rise")))
        if task.index and self.balance == "retrain":
            second = Tail(self.balanced_epochs, 1.0, milestones=(0.5,))
            phases.append(Phase("classifier", "balanced", second, backbone="eval", fresh_head=True))
        return tuple(phases)

    def parameters(self, net: Network, phase: Phase) -> Iterable[nn.Parameter]:
        if phase.name == "classifier":
            return net.head.blocks.parameters()
        extractors = cast(ExpandableBackbone, net.backbone).extractors
        return [*extractors[-1].parameters(), *net.head.parameters()]

    def loss(self, step: Step) -> dict[str, Tensor]:
        logits, targets, head = step.out.logits, step.batch.targets, cast(Expanding, step.net.head)
        if step.phase.name == "classifier":
            return {"ce": F.cross_entropy(logits / self.temperature, targets)}
        terms = {"ce": F.cross_entropy(logits, targets)}
        if head.auxiliary is not None:
            one_of_old = (targets - step.task.old + 1).clamp(min=0)
            newest = head.auxiliary(step.out.embedding[:, -head.dim :])
            terms["auxiliary"] = self.auxiliary * F.cross_entropy(newest, one_of_old)
        return terms

    def remember(self, net: Network, task: Task, batches: Callable[[], Iterable[Batch]]) -> Past | None:
        if task.index and self.balance == "align":
            align(cast(nn.Linear, net.head.blocks[0]).weight, task.old)
        return None


@hookspecs.hookimpl
def cilnorm_methods() -> list[hookspecs.Method]:
    return [hookspecs.Method("der", DER, "https://arxiv.org/abs/2103.16788")]
