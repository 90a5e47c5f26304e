"""The four passes over a tensor in channels_last layout on the CPU, where convolutions run fastest.

There a row is a matrix (area, C), so sums over the area are products with a row of ones, which BLAS does at the speed
of memory; torch's own reductions keep one channel at a time in mind and need six times as long. Values are shifted by
a pilot near their mean before they are squared, since E[x²] − μ² loses everything once |μ| is a thousand deviations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cilnorm_norms._passes_torch import Pair

PILOT_EVERY = 8  # rows that the pilot looks at; it need not be the mean, only be near it


def suits(x: Tensor) -> bool:
    """Whether these passes can read ``x`` where it lies."""
    right_type = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    return right_type and x.is_contiguous(memory_format=torch.channels_last) and x.numel() > 0


def moments(x: Tensor, current: int, lanes: int) -> tuple[Pair, Pair]:
    """Means and biased variances of every lane and of the past rows (zeros where there are none)."""
    rows = _rows(x)
    pilot = rows[::PILOT_EVERY].mean((0, 1))
    shifted = rows - pilot
    mean = _over_area(shifted) / rows.shape[1]
    square = _over_area(shifted.square_()) / rows.shape[1]
    means, squares = _of_parts(mean, current, lanes), _of_parts(square, current, lanes)
    variances = Pair(*(sq - m.square() for m, sq in zip(means, squares, strict=True)))
    if current == len(rows):
        return Pair(means.lanes + pilot, torch.zeros_like(pilot)), Pair(variances.lanes, torch.zeros_like(pilot))
    return Pair(*(m + pilot for m in means)), variances


def affine(x: Tensor, current: int, mean: Pair, scale: Pair, shift: Pair) -> Tensor:
    """scale · (x − mean) + shift."""
    y = torch.empty_like(x)
    parts = zip(_cut(x, current, mean), _cut(y, current, mean), mean, scale, shift, strict=True)
    for part, out, m, a, b in parts:
        torch.sub(part, m.unsqueeze(-2), out=out)
        torch.addcmul(b.unsqueeze(-2), out, a.unsqueeze(-2), out=out)
    return y


def sums(g: Tensor, x: Tensor, current: int, mean: Pair) -> tuple[Pair, Pair]:
    """Σ g and Σ g · (x − mean) of every lane and of the past rows."""
    lanes = len(mean.lanes)
    pilot = mean.lanes.mean(0)
    products = (_rows(x) - pilot).mul_(_rows(g))
    of_g, of_products = _over_area(_rows(g)), _over_area(products)
    counts = (current // lanes, len(x) - current)
    total = Pair(*(m * n for m, n in zip(_of_parts(of_g, current, lanes), counts, strict=True)))
    dot = [p * n for p, n in zip(_of_parts(of_products, current, lanes), counts, strict=True)]
    return total, Pair(*(d - (m - pilot) * t for d, m, t in zip(dot, mean, total, strict=True)))


def gradient(g: Tensor, x: Tensor, current: int, mean: Pair, of_g: Pair, of_x: Pair, shift: Pair) -> Tensor:
    """of_g · g + of_x · (x − mean) + shift."""
    dx = affine(x, current, mean, of_x, shift)
    for out, part, factor in zip(_cut(dx, current, mean), _cut(g, current, mean), of_g, strict=True):
        out.addcmul_(part, factor.unsqueeze(-2))
    return dx


def _rows(x: Tensor) -> Tensor:
    """(N, area, C), as a view."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _cut(x: Tensor, current: int, like: Pair) -> tuple[Tensor, Tensor]:
    """Current rows (M, L, area, C) and past rows (P, area, C), as views."""
    rows = _rows(x)
    return rows[:current].unflatten(0, (-1, len(like.lanes))), rows[current:]


def _over_area(rows: Tensor) -> Tensor:
    """Sums (N, C) over the area of (N, area, C)."""
    ones = rows.new_ones(1, 1, 1).expand(len(rows), 1, rows.shape[1])
    return torch.bmm(ones, rows)[:, 0]


def _of_parts(values: Tensor, current: int, lanes: int) -> Pair:
    """Means over rows of (N, C): of every lane (L, C) and of the past rows (C,), zeros where there are none."""
    past = values[current:]
    own = values[:current].unflatten(0, (-1, lanes)).mean(0)
    return Pair(own, past.mean(0) if len(past) else torch.zeros_like(values[0]))
