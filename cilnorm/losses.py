"""Terms of objectives, as pure functions of tensors; every one is a mean over rows and answers with a scalar.

Nothing here reads a value back from the device, so a step that uses these terms can be captured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "POOLINGS",
    "channel_importance",
    "cosine_distance",
    "distill",
    "distill_elementwise",
    "margin_ranking",
    "mean_over",
    "nca",
    "pod",
    "soft_cross_entropy",
    "weighted_map_distance",
]


def distill(new: Tensor, old: Tensor, temperature: float) -> Tensor:
    """τ² KL(softmax(old / τ) || softmax(new / τ)).

    Hinton et al., https://arxiv.org/abs/1503.02531, section 2; τ² keeps the gradient's size independent of τ.

    Args:
        new, old: logits (N, classes).
    """
    log_new, log_old = F.log_softmax(new / temperature, dim=1), F.log_softmax(old / temperature, dim=1)
    return temperature**2 * F.kl_div(log_new, log_old, reduction="batchmean", log_target=True)


def soft_cross_entropy(new: Tensor, old: Tensor, temperature: float) -> Tensor:
    """−Σ_c softmax(old / τ)_c log softmax(new / τ)_c.

    Distillation as WA, BiC and PyCIL's iCaRL write it: without the factor τ², so its gradient is that of ``distill``
    divided by τ². Its least value is the entropy of softmax(old / τ), not 0.

    Args:
        new, old: logits (N, classes).
    """
    return F.cross_entropy(new / temperature, (old / temperature).softmax(1))


def shared_distillation(logits: Tensor, targets: Tensor, old: Tensor | None, temperature: float) -> dict[str, Tensor]:
    """(1 − λ) CE(z, y) + λ ``soft_cross_entropy`` of old classes, λ being the share of old classes; CE where none are.

    The objective of WA (https://arxiv.org/abs/1911.07053, section 3) and of BiC (https://arxiv.org/abs/1905.13260,
    section 3), as its two terms ``ce`` and ``distill``.

    Args:
        logits: (N, seen).
        targets: (N,).
        old: the teacher's logits, (N, old classes).
    """
    ce = F.cross_entropy(logits, targets)
    if old is None:
        return {"ce": ce}
    known = old.shape[1]
    share = known / logits.shape[1]
    distill = soft_cross_entropy(logits[:, :known], old, temperature)
    return {"ce": (1 - share) * ce, "distill": share * distill}


def distill_elementwise(new: Tensor, old: Tensor, temperature: float) -> Tensor:
    """Binary cross-entropy between the entries of softmax(new / τ) and of softmax(old / τ), mean over rows and classes.

    What FACIL (https://arxiv.org/abs/2010.15277) computes for EEIL's distillation; there is no factor τ².

    Args:
        new, old: logits (N, classes).
    """
    return F.binary_cross_entropy((new / temperature).softmax(1), (old / temperature).softmax(1))


def cosine_distance(new: Tensor, old: Tensor) -> Tensor:
    """1 − cos(new, old); "less-forget" of LUCIR (section 3.3 there) and "POD-flat" of PODNet (section 3.1 there).

    Args:
        new, old: embeddings (N, dim).
    """
    return (1 - F.cosine_similarity(new, old, dim=1)).mean()


def margin_ranking(scores: Tensor, targets: Tensor, old: int, k: int, margin: float) -> Tensor:
    """max(0, margin − score of the true class + score of a new class), for the k highest new classes of every old row.

    Hou et al., LUCIR, CVPR 2019, section 3.4. Mean over rows of old classes and over k; 0 without such rows.

    Args:
        scores: (N, seen), cosines.
        targets: (N,).
        old: the first so many columns are old classes.
        k: cut to the number of new classes.
    """
    of_old = targets < old
    hardest = scores[:, old:].topk(min(k, scores.shape[1] - old), dim=1).values
    violation = (margin - scores.gather(1, targets.unsqueeze(1)) + hardest).clamp(min=0).mean(1)
    return (violation * of_old).sum() / of_old.sum().clamp(min=1)


def mean_over(values: Tensor, which: Tensor) -> Tensor:
    """The mean of some of the values; 0 where there are none.

    Args:
        values: any shape; finite, the others too.
        which: bool, of the same shape.
    """
    return torch.where(which, values, 0.0).sum() / which.sum().clamp(min=1)


def nca(logits: Tensor, targets: Tensor, margin: float = 0.0) -> Tensor:
    """−(s_y − M) + log(1 + Σ_{c≠y} exp(s_c − M)), M = max_c s_c.

    The classification loss of PODNet (https://arxiv.org/abs/2004.13513, section 3.2) as the authors' code has it. Two
    things in it differ from the paper. The shift by M turns the true class' place in the denominator into exp(0) = 1
    instead of removing it, and the hinge is left out. And the margin is taken from every class, not from the true one
    alone, so it cancels in the shift: any margin gives the same loss.

    Args:
        logits: η times the similarities, (N, classes).
        targets: (N,).
    """
    shifted = logits - margin
    shifted = shifted - shifted.max(1, keepdim=True).values
    true = targets.unsqueeze(1)
    others = shifted.scatter(1, true, 0.0)
    return (others.logsumexp(1) - shifted.gather(1, true)[:, 0]).mean()


# Each makes (N, features) of the squares (N, C, H, W) of a map. PODNet, section 3.1.
POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels": lambda squares: squares.sum(1).flatten(1),
    "width": lambda squares: squares.sum(2).flatten(1),
    "height": lambda squares: squares.sum(3).flatten(1),
    "gap": lambda squares: squares.mean((2, 3)),
    "spatial": lambda squares: torch.cat([squares.sum(3).flatten(1), squares.sum(2).flatten(1)], dim=1),
}


def pod(new: Sequence[Tensor], old: Sequence[Tensor], pooling: str = "spatial") -> Tensor:
    """‖ψ(new) − ψ(old)‖ of pooled outputs, ψ squares, pools and L2-normalises; mean over rows and maps.

    Douillard et al., PODNet, https://arxiv.org/abs/2004.13513, section 3.1. The authors' code squares each entry before
    pooling and takes the distance, not its square.

    Args:
        new, old: maps (N, C, H, W), shallow to deep.
        pooling: a key of ``POOLINGS``.
    """
    pool = POOLINGS[pooling]
    pairs = [(F.normalize(pool(a.square()), dim=1), F.normalize(pool(b.square()), dim=1)) for a, b in _pairs(new, old)]
    return torch.stack([torch.linalg.vector_norm(a - b, dim=1).mean() for a, b in pairs]).mean()


def weighted_map_distance(new: Sequence[Tensor], old: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """ω_c ‖ψ(new)_c − ψ(old)_c‖, ψ squares and L2-normalises each channel's plane; mean over rows, channels, maps.

    Kang et al., AFC, https://arxiv.org/abs/2204.00895, in the form of the authors' code.

    Args:
        new, old: maps (N, C, H, W), shallow to deep.
        weights: ω (C,), one a map.
    """
    terms = []
    for (a, b), weight in zip(_pairs(new, old), weights, strict=True):
        planes = F.normalize(a.square().flatten(2), dim=2) - F.normalize(b.square().flatten(2), dim=2)
        terms.append((weight * torch.linalg.vector_norm(planes, dim=2)).mean())
    return torch.stack(terms).mean()


def channel_importance(gradient: Tensor) -> Tensor:
    """Σ_hw (∂L/∂map)², mean over rows: what a batch adds to a channel's importance (AFC).

    Args:
        gradient: of the batch-mean loss with respect to a map, (N, C, H, W).

    Returns:
        (C,).
    """
    return gradient.square().sum((2, 3)).mean(0)


def _pairs(new: Sequence[Tensor], old: Sequence[Tensor]) -> zip[tuple[Tensor, Tensor]]:
    return zip(new, old, strict=True)
