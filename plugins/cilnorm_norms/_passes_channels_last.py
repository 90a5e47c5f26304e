"""The four passes over a tensor in channels_last layout on the CPU, where convolutions run fastest.

There a row is a matrix (area, C), and torch's kernels keep C values at a time in mind, sixteen say. So a row is
read as fewer, longer lines of several pixels each, (lines, pixels · C), and values of channels are repeated to match.
Rows are worked through a few at a time, so that what one operation leaves is still in the cache when the next one asks.
Values are shifted by a pilot near their mean before they are squared, since E[x²] − μ² loses everything once |μ| is a
thousand deviations.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cilnorm_norms._passes_torch import Pair

PILOT_EVERY = 8  # rows that the pilot looks at; it need not be the mean, only be near it
LINE = 256  # values; from some hundred on kernels run at full speed
BLOCK = 128 * 1024  # values; half a megabyte lies in the second-level cache, with room for two more like it


def suits(x: Tensor) -> bool:
    """Whether these passes can read ``x`` where it lies."""
    right_type = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    return right_type and x.is_contiguous(memory_format=torch.channels_last) and x.numel() > 0


def moments(x: Tensor, current: int, lanes: int) -> tuple[Pair, Pair]:
    """Means and biased variances of every lane and of the past rows (zeros where there are none)."""
    channels, area = x.shape[1], x.shape[2] * x.shape[3]
    lines = _lines(x)
    pilot = lines[::PILOT_EVERY].mean((0, 1)).view(-1, channels).mean(0)
    sums, squares = [], []
    for part, shifted in _blocks_of_rows(lines):
        torch.sub(part, _repeated(pilot, lines), out=shifted)
        sums.append(shifted.sum(1))
        squares.append(shifted.square_().sum(1))
    means = _of_parts(_of_channels(sums, channels) / area, current, lanes)
    squared = _of_parts(_of_channels(squares, channels) / area, current, lanes)
    variances = Pair(*(sq - m.square() for m, sq in zip(means, squared, strict=True)))
    if current == len(x):
        return Pair(means.lanes + pilot, torch.zeros_like(pilot)), Pair(variances.lanes, torch.zeros_like(pilot))
    return Pair(*(m + pilot for m in means)), variances


def affine(x: Tensor, current: int, mean: Pair, scale: Pair, shift: Pair) -> Tensor:
    """scale · (x − mean) + shift."""
    y = torch.empty_like(x)
    for (part, out), (m, a, b) in _blocks_of_lanes((x, y), current, (mean, scale, shift)):
        torch.sub(part, m, out=out)
        torch.addcmul(b, out, a, out=out)
    return y


def sums(g: Tensor, x: Tensor, current: int, mean: Pair) -> tuple[Pair, Pair]:
    """Σ g and Σ g · (x − mean) of every lane and of the past rows."""
    channels, lanes = x.shape[1], len(mean.lanes)
    lines, pilot = _lines(x), mean.lanes.mean(0)
    of_g, of_products, start = [], [], 0
    for part, product in _blocks_of_rows(lines):
        upstream = _lines(g)[start : start + len(part)]
        start += len(part)
        torch.sub(part, _repeated(pilot, lines), out=product)
        of_products.append(product.mul_(upstream).sum(1))
        of_g.append(upstream.sum(1))
    counts = (current // lanes, len(x) - current)
    of_rows = (_of_parts(_of_channels(each, channels), current, lanes) for each in (of_g, of_products))
    total, dot = (Pair(*(mean * n for mean, n in zip(each, counts, strict=True))) for each in of_rows)
    return total, Pair(*(d - (m - pilot) * t for d, m, t in zip(dot, mean, total, strict=True)))


def gradient(g: Tensor, x: Tensor, current: int, mean: Pair, of_g: Pair, of_x: Pair, shift: Pair) -> Tensor:
    """of_g · g + of_x · (x − mean) + shift."""
    dx = torch.empty_like(x)
    for (part, upstream, out), (m, a, b, factor) in _blocks_of_lanes((x, g, dx), current, (mean, of_x, shift, of_g)):
        torch.sub(part, m, out=out)
        torch.addcmul(b, out, a, out=out)
        out.addcmul_(upstream, factor)
    return dx


def _lines(x: Tensor) -> Tensor:
    """(N, lines, pixels · C), as a view."""
    channels, area = x.shape[1], x.shape[2] * x.shape[3]
    pixels = max(p for p in range(1, max(1, LINE // channels) + 1) if area % p == 0)
    return x.permute(0, 2, 3, 1).view(len(x), area // pixels, pixels * channels)


def _repeated(value: Tensor, lines: Tensor) -> Tensor:
    """(..., C) as (..., 1, pixels · C)."""
    pixels = lines.shape[-1] // value.shape[-1]
    return value.unsqueeze(-2).expand(*value.shape[:-1], pixels, -1).flatten(-2).unsqueeze(-2)


def _blocks_of_rows(lines: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows after another, and memory for as many values, the same for all."""
    rows = max(1, BLOCK // lines[0].numel())
    work = torch.empty_like(lines[:rows])
    return ((part, work[: len(part)]) for part in lines.split(rows))


def _blocks_of_lanes(
    tensors: tuple[Tensor, ...], current: int, values: tuple[Pair, ...]
) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """Some rows of each tensor, and what of ``values`` goes with them: all lanes of current rows, then past rows."""
    every = [_lines(tensor) for tensor in tensors]
    lanes, most = len(values[0].lanes), max(1, BLOCK // every[0][0].numel())
    repeated = _repeated(torch.stack([torch.cat([value.lanes, value.past[None]]) for value in values]), every[0])
    own, past = repeated[:, :-1].unbind(), repeated[:, -1].unbind()
    parts = (lines[:current].unflatten(0, (-1, lanes)).split(max(1, most // lanes)) for lines in every)
    yield from ((part, own) for part in zip(*parts, strict=True))
    if current < len(every[0]):
        yield from ((part, past) for part in zip(*(lines[current:].split(most) for lines in every), strict=True))


def _of_channels(sums: list[Tensor], channels: int) -> Tensor:
    """Sums (N, C) of rows from those (rows, pixels · C) of blocks."""
    return torch.cat(sums).unflatten(1, (-1, channels)).sum(1)


def _of_parts(values: Tensor, current: int, lanes: int) -> Pair:
    """Means over rows of (N, C): of every lane (L, C) and of the past rows (C,), zeros where there are none."""
    past = values[current:]
    own = values[:current].unflatten(0, (-1, lanes)).mean(0)
    return Pair(own, past.mean(0) if len(past) else torch.zeros_like(values[0]))
