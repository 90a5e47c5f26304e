"""Classifiers that grow by a block of classes a task."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Head", "Linear"]


class Head(nn.Module):
    """What every classifier offers: ``blocks``, one a task, and ``grow``."""

    blocks: nn.ModuleList

    def grow(self, classes: int) -> None:
        """Adds a block for ``classes`` new classes, freshly initialised."""
        raise NotImplementedError

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Embedding (N, dim) to logits and scores, both (N, seen); scores are logits before any learned scale."""
        raise NotImplementedError


class Linear(Head):
    """One affine layer a task; its outputs stand side by side."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.blocks = nn.ModuleList()

    def grow(self, classes: int) -> None:
        self.blocks.append(nn.Linear(self.dim, classes))

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.cat([block(embedding) for block in self.blocks], dim=1)
        return logits, logits
