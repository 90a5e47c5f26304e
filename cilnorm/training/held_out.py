"""Images that a phase leaves out of its rows, for another phase of the same task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["held_per_class", "hold_out"]


def held_per_class(part: float, exemplars: Sequence[int]) -> int:
    """How many images of every class are held out: a part of what the smallest old class has, at least one.

    Args:
        exemplars: their number in each old class.
    """
    return max(1, int(part * min(exemplars)))


def hold_out(
    new: Sequence[Tensor], exemplars: Sequence[Tensor], part: float, stream: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws as many images of every class.

    Args:
        new, exemplars: indices of images of the new and the old classes, one tensor a class.
        part: of each old class' exemplars, see ``held_per_class``.
        stream: draws them.

    Returns:
        What is left of the new images and of the exemplars, and what is held out.
    """
    count = held_per_class(part, [len(stored) for stored in exemplars])
    left, held = [], []
    for members in (*exemplars, *new):
        order = torch.randperm(len(members), generator=stream)
        held.append(members[order[:count]])
        left.append(members[order[count:].sort().values])
    old = len(exemplars)
    return torch.cat(left[old:]), torch.cat(left[:old]), torch.cat(held)
