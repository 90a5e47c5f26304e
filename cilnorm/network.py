"""A backbone and a head; and norms that bring their activation along."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from cilnorm.batch import Composition, set_composition
from cilnorm.heads import Head
from cilnorm.rows_aware import Rows, RowsAware, Telling

__all__ = ["Network", "Output", "SelfActivating", "activation_after", "without_activation"]


class SelfActivating(nn.Module):
    """A norm with an activation of its own, which takes the place of the one that would follow it.

    Attributes:
        alone: whether a layer activates where nobody says if an activation follows: in a network that applies its own.
        activates: whether it does now.
        fixed: whether the user chose that, so that the network has no say in it.
        replaces: whether it stands for an activation that the network leaves to it.
    """

    alone: ClassVar[bool] = False
    activates: bool
    fixed: bool
    replaces: bool = False

    def choose_activation(self, act: bool | None) -> None:
        """Sets what the user asks for, at construction; None leaves it to the network."""
        self.fixed = act is not None
        self.set_activation(self.alone if act is None else act)

    def set_activation(self, act: bool) -> None:
        """Switches the activation on or off, and makes or drops the parameters that belong to it."""
        raise NotImplementedError


def activation_after(norm: nn.Module) -> nn.Module:
    """The activation that a network applies to what ``norm`` returns: a ReLU, or nothing where the norm has its own."""
    if isinstance(norm, SelfActivating):
        if not norm.fixed:
            norm.set_activation(True)
        norm.replaces = norm.activates
        if norm.activates:
            return nn.Identity()
    return nn.ReLU()


def without_activation(norm: nn.Module) -> nn.Module:
    """The layer, told that no activation follows it: the last norm of a residual branch, say."""
    if isinstance(norm, SelfActivating) and not norm.fixed:
        norm.set_activation(False)
    return norm


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
    """Classifies with ``head`` what ``backbone`` embeds; remembers what composition its layers were told.

    Attributes:
        views: names under which it answers, each with logits of its own; the first one fills the accuracy matrix.
    """

    views: tuple[str, ...] = ("",)

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

    def grow(self, classes: int) -> None:
        """Makes room for ``classes`` new classes; what is new is drawn from torch's global generator."""
        self.head.grow(classes)

    def look(self, view: str = "") -> None:
        """Answers as one of its ``views`` from now on, or as one that it has for training; as the first by default."""

    def observe(self, composition: Composition) -> None:
        """Tells the layers what the next training batches are made of, if that is news."""
        if composition != self._composition:
            set_composition(self, composition, expect_listeners=False)
            self._composition = composition

    def forward(self, images: Tensor) -> Output:
        embedding, maps = self.backbone(images)
        logits, scores = self.head(embedding)
        return Output(logits, scores, embedding, maps)
