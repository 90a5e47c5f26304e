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
    rows = F.normalize(features.double(), dim=1)
    squares = rows.square().sum(1)
    mean, total = rows.mean(0), torch.zeros_like(rows[0])
    picked = torch.empty(min(count, len(rows)), dtype=torch.long, device=rows.device)
    for k in range(len(picked)):
        cost = squares + 2 * (rows @ (total - (k + 1) * mean))
        best = cost.argmin()
        picked[k] = best
        squares[best] = torch.inf
        total = total + rows[best]
    return picked


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


HERDINGS: dict[str, Callable[[Tensor, int], Tensor]] = {"greedy": herd_greedy, "icarl": herd_icarl}


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
        pick = HERDINGS[herding]
        old = self.exemplars if herd_again else ()
        kept = () if herd_again else tuple(stored[:count] for stored in self.exemplars)
        chosen = tuple(pool[pick(features(pool), count)] for pool in (*old, *candidates))
        return Memory((*kept, *chosen))
