"""What FOSTER trains: an old extractor, a new one beside it, and a student, with a classifier for each use of them.

Wang et al., ECCV 2022, https://arxiv.org/abs/2204.04662.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from cilnorm.growing import ExpandableBackbone
from cilnorm.heads import Expanding
from cilnorm.network import Network

View = Literal["student", "teacher"]
OLD, NEW, STUDENT = range(3)  # places of the extractors, from the second task on


class BoostedHead(Expanding):
    """Classifiers of the old branch, of both, of the new one, and of the student; the student's is ``blocks[0]``.

    Attributes:
        view: whose logits it gives: ``teacher``, ``student``, or ``compression``: the student's, of all embeddings.
        old: (old, dim), the student's of the task before; None in the first task, as the next two.
        wide: (seen, 2 · dim), ``old`` is a part of it at the start.
        feature: (seen, dim), of the new extractor alone.
    """

    view: str = "student"

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.old: nn.Linear | None = None
        self.wide: nn.Linear | None = None
        self.feature: nn.Linear | None = None

    def grow(self, classes: int) -> None:
        if not self.blocks:
            super().grow(classes)
            return
        last = self.blocks[0]
        assert isinstance(last, nn.Linear)
        self.old, self.wide = last, self.widened(last, self.dim, classes)
        self.feature = self.affine(self.dim, self.wide.out_features)
        self.blocks[0] = self.widened(last, 0, classes)

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        if self.wide is not None and self.view == "teacher":
            logits = self.wide(embedding)
        else:
            logits = self.blocks[0](embedding[:, -self.dim :])
        return logits, logits


class BoostedNetwork(Network):
    """The two branches and the student, which takes over at the next task; in the first task they are one.

    Args:
        scored: which of the two views comes first.
    """

    backbone: ExpandableBackbone
    head: BoostedHead

    def __init__(self, backbone: ExpandableBackbone, head: BoostedHead, scored: View) -> None:
        super().__init__(backbone, head)
        self.views = ("student", "teacher") if scored == "student" else ("teacher", "student")
        self._view = ""
        self.look()

    def grow(self, classes: int) -> None:
        body = self.backbone
        if self.head.blocks:
            last = body.extractors[-1]
            body.extractors = nn.ModuleList([last, body.another(last, body.start), body.another(last, "copy")])
        super().grow(classes)
        self._view = ""
        self.look()

    def look(self, view: str = "") -> None:
        """As the ``teacher``, the ``student``, or in ``compression`` as the student with the teacher's embedding."""
        view = view or self.views[0]
        if view == self._view:
            return
        self._view = self.head.view = view
        if len(self.backbone.extractors) > 1:
            used = {"teacher": (OLD, NEW), "student": (STUDENT,), "compression": (OLD, NEW, STUDENT)}[view]
            self.backbone.choose(used, used[-1])
            self.forget()  # another extractor listens

    def learning(self, view: str) -> Iterator[nn.Parameter]:
        """The parameters that are trained in a view: of the extractor that learns then, and its classifiers."""
        extractors, head = self.backbone.extractors, self.head
        if head.wide is None or head.feature is None:
            yield from self.parameters()
        elif view == "teacher":
            yield from (*extractors[NEW].parameters(), *head.wide.parameters(), *head.feature.parameters())
        else:
            yield from (*extractors[STUDENT].parameters(), *head.blocks.parameters())


def class_weights(images: tuple[int, ...], beta: float, like: Tensor) -> Tensor:
    """ω_c ∝ (1 − β) / (1 − β^N_c), 1 on average; of the device and type of ``like``.

    Cui et al., https://arxiv.org/abs/1901.05555, section 3.

    Args:
        images: N_c, how many images of each class are trained on.

    Raises:
        ValueError: nobody counted them.
    """
    if not images:
        raise ValueError("classes are weighed by their number of images; say them in Task.images")
    return _weights(images, beta, like.device, like.dtype)


@functools.lru_cache(maxsize=16)  # so that a captured step finds it on the device
def _weights(images: tuple[int, ...], beta: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    weights = (1 - beta) / (1 - beta ** torch.tensor(images, dtype=torch.float64))
    return (weights / weights.mean()).to(device, dtype)
