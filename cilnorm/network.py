"""A backbone and a head."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from cilnorm.batch import Composition, set_composition
from cilnorm.heads import Head
from cilnorm.rows_aware import Rows, RowsAware, Telling

__all__ = ["Network", "Output"]


class Output(NamedTuple):
    """What a network says of N images.

    Attributes:
        logits: (N, seen), what cross-entropy takes.
        scores: (N, seen), logits before any learned scale (cosines, say).
        embedding: (N, dim), what the head sees.
        maps: stage outputs of the backbone before their last ReLU, shallow to deep.
    """

    logits: Tensor
    scores: Tensor
    embedding: Tensor
    maps: list[Tensor]


class Network(RowsAware):
    """Classifies with ``head`` what ``backbone`` embeds; remembers what composition its layers were told."""

    def __init__(self, backbone: nn.Module, head: Head) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self._composition: Composition | None = None

    def receive(self, telling: Telling, rows: Rows) -> None:
        """Its layers are told of rows instead of a composition."""
        self.forget()

    def forget(self) -> None:
        self._composition = None

    def observe(self, composition: Composition) -> None:
        """Tells the layers what the next training batches are made of, if that is news."""
        if composition != self._composition:
            set_composition(self, composition, expect_listeners=False)
            self._composition = composition

    def forward(self, images: Tensor) -> Output:
        embedding, maps = self.backbone(images)
        logits, scores = self.head(embedding)
        return Output(logits, scores, embedding, maps)
