"""Exemplars: how many a class may keep, and which.

Herding follows iCaRL (https://arxiv.org/abs/1611.07725, algorithm 4) in the two forms that are in use: ``greedy``
(FACIL, the TBBN experiments, PyCIL) and ``icarl`` (the repositories of LUCIR, PODNet and AFC). The other rules are
what herding is compared with: ``random`` images of a class, those ``closest`` to its mean, and a ``reservoir``
(Vitter, https://doi.org/10.1145/3147.3165, algorithm R), one for all classes, in which every image met so far is
kept with the same probability, as in the rehearsal buffers of online learning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from cilnorm.training.randomness import generator

__all__ = ["HERDINGS", "Draws", "ExemplarRule", "Memory", "herd_greedy", "herd_icarl", "per_class"]

ExemplarRule = Literal["greedy", "icarl", "random", "closest", "reservoir"]


def per_class(budget: int, classes: int, rounding: Literal["floor", "ceil"] = "floor") -> int:
    """Exemplars that each of ``classes`` seen classes may keep.

    ``ceil`` is the released code's rule; it stores up to one image a class more than the budget.

    Raises:
        ValueError: the budget holds no exemplar for some class; one of 0, that there are none, is what it says.
    """
    if 0 < budget < classes or budget < 0:
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


def _each_closest(features: Sequence[Tensor], count: int) -> list[Tensor]:
    """The rows nearest to the mean of the normalised features, nearest first; of equals the first."""
    orders = []
    for of_class in features:
        rows = F.normalize(of_class.double(), dim=1)
        distances = (rows - rows.mean(0)).square().sum(1)
        orders.append(distances.argsort(stable=True)[:count])
    return orders


Herding = Callable[[Sequence[Tensor], int], list[Tensor]]
HERDINGS: dict[str, Herding] = {
    "greedy": _each_greedily, "icarl": _each_along_icarl, "closest": _each_closest,
}  # fmt: skip


@dataclass(frozen=True)
class Draws:
    """Where chance comes from for rules that need it: a stream a class, of the run's seed and the task at hand."""

    seed: int = 0
    task: int = 0

    def shuffled(self, pool: Tensor, label: int) -> Tensor:
        """The pool of a class in random order."""
        return pool[torch.randperm(len(pool), generator=generator(self.seed, "exemplars", self.task, label))]


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
        herding: ExemplarRule,
        herd_again: bool,
        draws: Draws = Draws(),  # frozen
    ) -> Memory:
        """The memory after a task, under every rule but ``reservoir``.

        Args:
            candidates: indices of the new classes' training images, one tensor a class.
            features: embeds images given by indices, (n,) -> (n, d).
            count: exemplars a class.
            herd_again: whether stored exemplars are ranked anew by the current model (the released code);
                otherwise their lists are cut, as iCaRL's algorithm 5 does.
            draws: of ``random``.
        """
        kept = () if herd_again else tuple(stored[:count] for stored in self.exemplars)
        pools = (*(self.exemplars if herd_again else ()), *candidates)
        if not count:
            return Memory(tuple(pool[:0] for pool in (*kept, *pools)))
        if herding == "random":
            shuffled = [draws.shuffled(pool, label) for label, pool in enumerate(pools, len(kept))]
            return Memory((*kept, *(pool[:count] for pool in shuffled)))
        orders = HERDINGS[herding]([features(pool) for pool in pools], count)
        return Memory((*kept, *(pool[order.to(pool.device)] for pool, order in zip(pools, orders, strict=True))))

    def fill(self, candidates: Sequence[Tensor], size: int, met: int, draws: Draws) -> Memory:
        """A reservoir of ``size`` images after the task's images have come by once, in random order.

        A class may have no exemplar.

        Args:
            candidates: indices of the new classes' training images, one tensor a class.
            met: images of earlier tasks that came by.
            draws: their order, and which image each replaces.
        """
        images = torch.cat(list(candidates))
        labels = torch.cat([torch.full((len(of_class),), label) for label, of_class in enumerate(candidates)])
        order = draws.shuffled(torch.arange(len(images)), -1)
        held = [(label, index) for label, stored in enumerate(self.exemplars) for index in stored.tolist()]
        places = generator(draws.seed, "reservoir", draws.task)
        for number, at in enumerate(order.tolist(), met):
            entry = len(self.exemplars) + int(labels[at]), int(images[at])
            if len(held) < size:
                held.append(entry)
            elif (place := int(torch.randint(number + 1, (1,), generator=places))) < size:
                held[place] = entry
        kept: list[list[int]] = [[] for _ in range(len(self.exemplars) + len(candidates))]
        for label, index in held:
            kept[label].append(index)
        return Memory(tuple(torch.tensor(of_class, dtype=torch.long) for of_class in kept))
