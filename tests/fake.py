"""A plugin for tests: tiny images, a tiny backbone and methods that do one thing each; a run takes about a second."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cilnorm.batch import Batch, Task
from cilnorm.hookspecs import Backbone, Dataset, hookimpl
from cilnorm.hookspecs import Method as MethodRecord
from cilnorm.images import ImageSet
from cilnorm.method import Method, Past, Phase, Schedule, Step
from cilnorm.network import Network
from cilnorm.testing import toys


def blobs(root: Path | None, *, classes: int = 6, train: int = 24, test: int = 20, size: int = 8) -> ImageSet:
    """Noise around one random colour a class."""
    return replace(toys.images(root, classes=classes, train=train, test=test, size=size), digest="of-blobs")


class Tiny(nn.Module):
    """One convolution and one norm."""

    dim = 8

    def __init__(self, norm: Callable[[int], nn.Module], signed_embedding: bool = False) -> None:
        super().__init__()
        self.signed_embedding = signed_embedding
        self.conv = nn.Conv2d(3, self.dim, 3, padding=1, bias=False)
        self.norm = norm(self.dim)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.norm(self.conv(images))
        return (x if self.signed_embedding else F.relu(x)).mean((2, 3)), [x]


@dataclass(frozen=True)
class TwoPhases(Method):
    """A teacher, a balanced tail of one epoch, and something measured on the images: all that a state may hold."""

    strength: float = 1.0
    released = {"strength": 0.5, "protocol.current_rows": "union", "protocol.drop_last": True}  # noqa: RUF012

    def phases(self, task: Task) -> tuple[Phase, ...]:
        tail = Phase("tail", "balanced", Schedule(epochs=2, lr=0.01, momentum=0.9))
        return (Phase(), tail) if task.index else (Phase(),)

    def loss(self, step: Step) -> dict[str, Tensor]:
        terms = {"ce": F.cross_entropy(step.out.logits, step.batch.targets)}
        if step.old is not None and step.past is not None:
            drift = F.mse_loss(step.out.logits[:, : step.task.old], step.old.logits)
            terms["distil"] = self.strength * drift * step.past.tensors["scale"]
        return terms

    def remember(self, net: Network, task: Task, batches: Callable[[], Iterable[Batch]]) -> Past | None:
        with torch.no_grad():
            scale = torch.stack([batch.images.square().mean() for batch in batches()]).mean()
        return Past(copy.deepcopy(net).eval().requires_grad_(False), {"scale": scale})


@dataclass(frozen=True)
class Sour(Method):
    """Goes NaN at one epoch of one task."""

    at_task: int = 2

    def loss(self, step: Step) -> dict[str, Tensor]:
        loss = F.cross_entropy(step.out.logits, step.batch.targets)
        return {"ce": loss, "sour": loss.detach() * (float("nan") if step.task.index + 1 == self.at_task else 0.0)}


@hookimpl
def cilnorm_datasets() -> list[Dataset]:
    return [Dataset("blobs", blobs)]


@hookimpl
def cilnorm_backbones() -> list[Backbone]:
    return [Backbone("tiny", Tiny)]


@hookimpl
def cilnorm_methods() -> list[MethodRecord]:
    return [MethodRecord("two-phases", TwoPhases), MethodRecord("sour", Sour)]
