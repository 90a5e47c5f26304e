"""Classifiers that grow by a block of classes a task."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["BiasCorrected", "Cosine", "Expanding", "FixedCosine", "Head", "HeadStart", "Linear", "Proxies", "align"]

HeadStart = Literal["torch", "kaiming"]


class Head(nn.Module):
    """What every classifier offers: ``blocks``, one linear map a task, and ``grow``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.blocks = nn.ModuleList()

    @property
    def weights(self) -> Tensor:
        """The rows of all blocks, (rows, dim); a class may have several."""
        return torch.cat([cast(nn.Linear, block).weight for block in self.blocks])

    def grow(self, classes: int) -> None:
        """Adds a block for ``classes`` new classes, freshly initialised."""
        raise NotImplementedError

    def imprint(self, weights: Tensor) -> None:
        """Sets the newest block's rows, (rows, dim)."""
        with torch.no_grad():
            cast(nn.Linear, self.blocks[-1]).weight.copy_(weights)

    def redraw(self) -> None:
        """Draws the weights of all blocks anew, as when they were made."""
        for block in self.blocks:
            cast(nn.Linear, block).reset_parameters()

    def constrain(self) -> None:
        """Brings the weights back to where they may be; called after each step of training. Default: anywhere."""

    def newest(self) -> Iterator[nn.Parameter]:
        """The parameters of the newest block, and those that all blocks share."""
        yield from self.blocks[-1].parameters()
        yield from self.parameters(recurse=False)

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Embedding (N, dim) to logits and scores, both (N, seen); scores are logits before any learned scale."""
        raise NotImplementedError


def _drawn_by_width(layer: nn.Linear, normal: bool = False) -> nn.Linear:
    """Draws the weights with a variance of 1 / features, uniform or normal; biases are 0."""
    draw = nn.init.kaiming_normal_ if normal else nn.init.kaiming_uniform_
    draw(layer.weight, nonlinearity="linear")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class Linear(Head):
    """One affine layer a task; its outputs stand side by side.

    Args:
        bias: whether the layers have one.
        non_negative: whether weights below 0 are set to 0 after each step (WA, section 4.2).

    Attributes:
        start: how a new block starts. ``torch``: uniform in ±1/√dim, weights and bias; ``kaiming``: weights uniform in
            ±√(3/dim), He et al. with a gain of 1, and a bias of 0.
    """

    start: HeadStart = "torch"

    def __init__(self, dim: int, bias: bool = True, non_negative: bool = False) -> None:
        super().__init__(dim)
        self.bias, self.non_negative = bias, non_negative

    def grow(self, classes: int) -> None:
        self.blocks.append(self._started(nn.Linear(self.dim, classes, self.bias)))

    def redraw(self) -> None:
        super().redraw()
        for block in self.blocks:
            self._started(cast(nn.Linear, block))

    def _started(self, block: nn.Linear) -> nn.Linear:
        return _drawn_by_width(block) if self.start == "kaiming" else block

    def constrain(self) -> None:
        if self.non_negative:
            with torch.no_grad():
                for block in self.blocks:
                    cast(nn.Linear, block).weight.clamp_(min=0)

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.cat([block(embedding) for block in self.blocks], dim=1)
        return logits, logits


class Expanding(Linear):
    """One affine layer of all features, which grows both ways: every growth brings ``dim`` features and new outputs.

    Old outputs go on with the weights of old features; all else is drawn, U(±√(3 / features)), biases are 0.
    Yan et al., DER, https://arxiv.org/abs/2103.16788, section 3.2; the distribution is that of PyCIL.

    Args:
        dim: features that each growth brings.
        keep: whether weights and biases of old outputs go on at all.
        bias: whether there are any.
        normal: draw N(0, 1 / features) instead, as the code of DER's authors.

    Attributes:
        auxiliary: a layer from the newest ``dim`` features to the new classes, and the old ones as one that comes
            first; drawn anew at every growth, None before the second.
    """

    def __init__(self, dim: int, keep: bool = True, bias: bool = True, normal: bool = False) -> None:
        super().__init__(dim, bias)
        self.keep, self.normal = keep, normal
        self.auxiliary: nn.Linear | None = None

    def affine(self, features: int, classes: int) -> nn.Linear:
        """A layer with weights as this head draws them."""
        return _drawn_by_width(nn.Linear(features, classes, self.bias), self.normal)

    def widened(self, old: nn.Linear, features: int, classes: int) -> nn.Linear:
        """A layer with so many more features and outputs than ``old``, which it contains."""
        layer = self.affine(old.in_features + features, old.out_features + classes)
        with torch.no_grad():
            if self.keep:
                layer.weight[: old.out_features, : old.in_features] = old.weight
            if self.keep and self.bias:
                layer.bias[: old.out_features] = old.bias
        return layer

    def grow(self, classes: int) -> None:
        if self.blocks:
            self.blocks[0] = self.widened(cast(nn.Linear, self.blocks[0]), self.dim, classes)
            self.auxiliary = self.affine(self.dim, 1 + classes)
        else:
            self.blocks.append(self.affine(self.dim, classes))

    def redraw(self) -> None:
        for layer in (*self.blocks, *([self.auxiliary] if self.auxiliary is not None else [])):
            _drawn_by_width(cast(nn.Linear, layer), self.normal)


class Correction(nn.Module):
    """α z + β, with one α and one β."""

    def __init__(self, decay: bool) -> None:
        super().__init__()
        self.without_decay = () if decay else ("alpha", "beta")
        self.alpha, self.beta = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def forward(self, logits: Tensor) -> Tensor:
        corrected: Tensor = self.alpha * logits + self.beta
        return corrected


class BiasCorrected(Linear):
    """One affine layer a task, and an α and a β for all of its outputs; scores are the outputs before these.

    Wu et al., BiC, https://arxiv.org/abs/1905.13260, section 4.

    Args:
        decay: whether weight decay pulls at α and β.
    """

    def __init__(self, dim: int, decay: bool = False) -> None:
        super().__init__(dim)
        self.decay = decay
        self.corrections = nn.ModuleList()

    def grow(self, classes: int) -> None:
        super().grow(classes)
        self.corrections.append(Correction(self.decay))

    def correct(self, scores: Tensor) -> Tensor:
        """Logits of the layers' outputs, both (N, seen)."""
        parts = scores.split([cast(nn.Linear, block).out_features for block in self.blocks], dim=1)
        return torch.cat([correct(part) for correct, part in zip(self.corrections, parts, strict=True)], dim=1)

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        scores, _ = super().forward(embedding)
        return self.correct(scores), scores


class Cosine(Head):
    """scores = cos(f, w), logits = σ · scores, with one learned σ for all blocks.

    Hou et al., LUCIR, CVPR 2019, section 3.2. Weights start uniform in ±1/√dim.

    Args:
        scale: σ at the start; 1 in every released code.
    """

    def __init__(self, dim: int, scale: float = 1.0) -> None:
        super().__init__(dim)
        self.scale = nn.Parameter(torch.full((1,), scale))

    def grow(self, classes: int) -> None:
        self.blocks.append(nn.Linear(self.dim, classes, bias=False))  # torch's own start is that very interval

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.linear(F.normalize(embedding, dim=1), F.normalize(self.weights, dim=1))
        return self.scale * scores, scores


class FixedCosine(Head):
    """scores = f · w / ((‖f‖ + ε) (‖w‖ + ε)), logits = σ · scores, σ fixed.

    Chen et al., https://arxiv.org/abs/1904.04232, as the code of ER-ACE has it.

    Args:
        scale: σ.
        epsilon: ε.
    """

    def __init__(self, dim: int, scale: float = 10.0, epsilon: float = 1e-5) -> None:
        super().__init__(dim)
        self.scale, self.epsilon = scale, epsilon

    def grow(self, classes: int) -> None:
        self.blocks.append(nn.Linear(self.dim, classes, bias=False))

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        units = [each / (each.norm(dim=1, keepdim=True) + self.epsilon) for each in (embedding, self.weights)]
        scores = F.linear(*units)
        return self.scale * scores, scores


class Proxies(Head):
    """The local similarity classifier: several unit vectors a class, weighed by how near they are.

        raw_ck = −‖f̂ − ŵ_ck‖²,   scores_c = Σ_k softmax_k(raw_c) raw_ck,   logits = η · scores

    Douillard et al., PODNet, https://arxiv.org/abs/2004.13513, section 3.2, with the authors' code's distance in
    place of the paper's cosine (raw = 2 cos − 2). Rows are class-major: the proxies of a class stand together. They
    start normal with a deviation of 1/√dim.

    Args:
        proxies: a class.
        scale: the learned η at the start; 1 in the authors' code.
    """

    def __init__(self, dim: int, proxies: int = 10, scale: float = 1.0) -> None:
        super().__init__(dim)
        self.proxies = proxies
        self.scale = nn.Parameter(torch.full((1,), scale))

    def grow(self, classes: int) -> None:
        block = nn.Linear(self.dim, classes * self.proxies, bias=False)
        nn.init.kaiming_normal_(block.weight, nonlinearity="linear")
        self.blocks.append(block)

    def redraw(self) -> None:
        for block in self.blocks:
            nn.init.kaiming_normal_(cast(nn.Linear, block).weight, nonlinearity="linear")

    def similarities(self, embedding: Tensor) -> Tensor:
        """raw (N, seen · proxies): minus the squared distance of unit vectors."""
        return 2 * F.linear(F.normalize(embedding, dim=1), F.normalize(self.weights, dim=1)) - 2

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        raw = self.similarities(embedding).unflatten(1, (-1, self.proxies))
        scores = (raw.softmax(2) * raw).sum(2)
        return self.scale * scores, scores


@torch.no_grad()
def align(weight: Tensor, old: int) -> Tensor:
    """Scales the rows of new classes to the mean length of old ones, in place; returns the factor γ.

    Zhao et al., WA, https://arxiv.org/abs/1911.07053, section 4.1.

    Args:
        weight: rows of all classes, (seen, dim).
        old: the first so many rows are old classes.
    """
    lengths = weight.norm(dim=1)
    factor = lengths[:old].mean() / lengths[old:].mean()
    weight[old:] *= factor
    return factor
