"""Networks that get another feature extractor with the tasks, of whatever backbone and norm.

Only one extractor learns. The others are frozen whole: no gradient, evaluation mode whatever mode the network is put
in, and nothing is told to their layers, which normalise by the statistics of the task that they were trained in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from cilnorm.batch import Role
from cilnorm.network import Network

__all__ = ["ExpandableBackbone", "GrowingNetwork", "Start"]

Start = Literal["copy", "fresh"]


class ExpandableBackbone(nn.Module):
    """Extractors side by side; the embeddings of those in use are concatenated.

    Yan et al., DER, https://arxiv.org/abs/2103.16788, section 3.2.

    Args:
        build: makes an extractor, which maps images to an embedding (N, ``dim``) and maps, as every backbone does.
        start: a new one's weights: a ``copy`` of the last, running statistics included, or ``fresh`` ones.

    Attributes:
        start: as given.
        dim: of one extractor's embedding.
        used: which of ``extractors`` a pass goes through; its maps are those of the last of them.
    """

    def __init__(self, build: Callable[[], nn.Module], start: Start = "copy") -> None:
        super().__init__()
        self._build, self.start = build, start
        self.extractors = nn.ModuleList([build()])
        self.dim = cast(int, self.extractors[0].dim)
        self.choose([0], 0)

    def grow(self) -> None:
        """Freezes what there is, and adds an extractor that learns."""
        self.extractors.append(self.another(self.extractors[-1], self.start))
        count = len(self.extractors)
        self.choose(range(count), count - 1)

    def another(self, last: nn.Module, start: Start) -> nn.Module:
        """A new extractor, where ``last`` lies; it was told nothing, whatever ``last`` was told."""
        new = self._build()
        if start == "copy":
            new.load_state_dict(last.state_dict())
        new.to(next(last.parameters()))
        return new.to(memory_format=torch.channels_last)

    def choose(self, used: Sequence[int], learning: int) -> None:
        """Which extractors a pass goes through, and which of them learns."""
        self.used = tuple(used)
        for at, extractor in enumerate(self.extractors):
            role: Role = "learning" if at == learning else "frozen" if at in self.used else "idle"
            extractor.__dict__["role"] = role
        self.train(self.training)

    def train(self, mode: bool = True) -> Any:
        """As for every module; but extractors that don't learn stay in evaluation mode."""
        super().train(mode)
        for extractor in self.extractors:
            if extractor.__dict__["role"] != "learning":
                extractor.eval()
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        found = [self.extractors[at](images) for at in self.used]
        maps: list[Tensor] = found[-1][1]
        return torch.cat([embedding for embedding, _ in found], dim=1), maps


class GrowingNetwork(Network):
    """A network that gets an extractor with every task but the first, and a head that takes their embeddings."""

    backbone: ExpandableBackbone

    def grow(self, classes: int) -> None:
        if self.head.blocks:
            self.backbone.grow()
            self.forget()
        super().grow(classes)
