"""Exemplars: how many a class may keep, and which.

Herding follows iCaRL (https://arxiv.org/abs/1611.07725, algorithm 4) in the two forms that are in use: ``greedy``
(FACIL and the TBBN experiments) and ``icarl`` (the repositories of LUCIR, PODNet and AFC).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

__all__ = ["HERDINGS", "Memory", "herd_greedy", "herd_icarl", "per_class"]


def per_class(budget: int, classes: int, rounding: Literal["floor", "ceil"] = "floor") -> int:
    """Exemplars that each of ``classes`` seen classes may keep.

    ``ceil`` is the released code's rule; it stores up to one image a class more than the budget.

    Raises:
        ValueError: the budget holds no exemplar for some class.
    """
    if budget < classes:
        raise ValueError(f"a memory of {budget} can't hold one exemplar of each of {classes} classes")
    return -(-budget // classes) if rounding == "ceil" else budget // classes


def herd_greedy(features: Tensor, count: int) -> Tensor:
    """Picks ``count`` rows whose running mean stays nearest to the class mean, best first.

    Step k takes the unpicked row i that minimises ||mu - (S + f_i) / (k + 1)||, S the sum of the picked ones and mu
    the mean of the normalised features; the first of equals wins. Expanding the square leaves one product a step:
    argmin_i f_i.f_i + 2 f_i.(S - (k + 1) mu).

    Args:
        features: (n, d), any scale; rows are L2-normalised here.

    Returns:
        (min(count, n),) int64 indices into the rows.
    """
    return _each_greedily([features], count)[0]


def _each_greedily(features: Sequence[Tensor], count: int) -> list[Tensor]:
    """``herd_greedy`` of several classes side by side: a step is one product, and nothing is read back."""
    units = [F.normalize(of_class.double(), dim=1) for of_class in features]
    sizes = [len(of_class) for of_class in units]
    rows = pad_sequence(units, batch_first=True)
    squares = pad_sequence([of_class.square().sum(1) for of_class in units], True, torch.inf)
    mean = torch.stack([of_class.mean(0) for of_class in units])
    total, picked = torch.zeros_like(mean), []
    for k in range(min(count, max(sizes))):
        cost = squares + 2 * (rows @ (total - (k + 1) * mean).unsqueeze(2))[..., 0]
        best = cost.argmin(1, keepdim=True)
        picked.append(best)
        squares.scatter_(1, best, torch.inf)
        total = total + rows.gather(1, best.unsqueeze(2).expand(-1, -1, rows.shape[2]))[:, 0]
    return [order[: min(count, size)] for order, size in zip(torch.cat(picked, dim=1), sizes, strict=True)]


def herd_icarl(features: Tensor, count: int, limit: int = 1000) -> Tensor:
    """Picks up to ``count`` rows along w <- w + mu - f_i, i the row of largest w.f_i; a row met again is not counted.

    Args:
        features: (n, d), any scale; rows are L2-normalised here.
        limit: steps after which the search ends, whatever was found.

    Returns:
        int64 indices into the rows, at most ``min(count, n)`` of them.
    """
    rows = F.normalize(features.double(), dim=1)
    mean = rows.mean(0)
    w, picked = mean.clone(), dict[int, None]()
    for _ in range(limit):
        if len(picked) == min(count, len(rows)):
            break
        best = int((rows @ w).argmax())
        picked.setdefault(best)
        w = w + mean - rows[best]
    return torch.tensor(list(picked), dtype=torch.long, device=rows.device)


def _each_along_icarl(features: Sequence[Tensor], count: int) -> list[Tensor]:
    return [herd_icarl(of_class.cpu(), count) for of_class in features]  # every step reads back what it picked


Herding = Callable[[Sequence[Tensor], int], list[Tensor]]
HERDINGS: dict[str, Herding] = {"greedy": _each_greedily, "icarl": _each_along_icarl}


@dataclass(frozen=True, eq=False)
class Memory:
    """The exemplars held, as indices into the training images: one tensor a class, best first, in learning order."""

    exemplars: tuple[Tensor, ...] = ()

    @property
    def indices(self) -> Tensor:
        """Every exemplar, class by class; (0,) while there is none."""
        return torch.cat(self.exemplars) if self.exemplars else torch.empty(0, dtype=torch.long)

    def __len__(self) -> int:
        return sum(map(len, self.exemplars))

    def collect(
        self,
        candidates: Sequence[Tensor],
        features: Callable[[Tensor], Tensor],
        count: int,
        herding: Literal["greedy", "icarl"],
        herd_again: bool,
    ) -> Memory:
        """The memory after a task.

        Args:
            candidates: indices of the new classes' training images, one tensor a class.
            features: embeds images given by indices, (n,) -> (n, d).
            count: exemplars a class.
            herd_again: whether stored exemplars are ranked anew by the current model (the released code);
                otherwise their lists are cut, as iCaRL's algorithm 5 does.
        """
        kept = () if herd_again else tuple(stored[:count] for stored in self.exemplars)
        pools = (*(self.exemplars if herd_again else ()), *candidates)
        orders = HERDINGS[herding]([features(pool) for pool in pools], count)
        return Memory((*kept, *(pool[order.to(pool.device)] for pool, order in zip(pools, orders, strict=True))))
