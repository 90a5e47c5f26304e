"""The four passes over a tensor in channels_last layout on the CPU, where convolutions run fastest.

There a row is a matrix (area, C), and torch's kernels keep C values at a time in mind, sixteen say. So a row is
read as fewer, longer lines of several pixels each, (lines, pixels · C), and values of channels are repeated to match.
Rows are worked through a few at a time, so that what one operation leaves is still in the cache when the next one asks.
Values are shifted by a pilot near their mean before they are squared, since E[x²] − μ² loses everything once |μ| is a
thousand deviations.

What fits into the cache as a whole is worked through at once instead, with as few operations as will do: there the time
is not in the values but in the calls. Values are then centred at their lane's own mean.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from cilnorm_norms._passes.blocks import HALF, WideBlock, subtract, write
from cilnorm_norms._passes.plain import Pair, statistics_dtype

PILOT_EVERY = 8  # rows that the pilot looks at; it need not be the mean, only be near it
LINE = 256  # values; from some hundred on kernels run at full speed
SMALL = 320 * 1024  # values; below, a tensor is worked through at once
BLOCK = 128 * 1024  # values; half a megabyte lies in the second-level cache, with room for two more like it


def suits(x: Tensor) -> bool:
    """Whether these passes can read ``x`` where it lies."""
    right_type = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64, *HALF)
    return right_type and x.is_contiguous(memory_format=torch.channels_last) and x.numel() > 0


def moments(x: Tensor, current: int, lanes: int) -> tuple[Pair, Pair]:
    """Means and biased variances of every lane and of the past rows (zeros where there are none)."""
    channels, area = x.shape[1], x.shape[2] * x.shape[3]
    lines = _lines(x)
    if _is_small(x, current):
        share = _share(len(x), current, lanes, area, x.dtype)
        mean = _by_channel(share, lines.sum(1), channels)[:, 0]
        centred = lines - _repeated(mean, lines).index_select(0, _part(len(x), current, lanes))
        var = _by_channel(share, centred.square_().sum(1), channels)[:, 0]
        return Pair(mean[:-1], mean[-1]), Pair(var[:-1], var[-1])
    dtype = statistics_dtype(x)
    pilot = lines[::PILOT_EVERY].mean((0, 1)).view(-1, channels).mean(0).to(dtype)
    repeated = _repeated(pilot, lines)
    found = x.new_empty(len(x), 2, lines.shape[2], dtype=dtype)
    for part, shifted, of_rows in _blocks_of_rows(lines, found):
        subtract(part, repeated, shifted)
        torch.sum(shifted, 1, out=of_rows[:, 0])
        torch.sum(shifted.square_(), 1, out=of_rows[:, 1])
    mean, square = (
        _by_part(found, current, lanes, channels).div_(_values_by_part(len(x), current, lanes, area, dtype)).unbind(1)
    )
    var = torch.addcmul(square, mean, mean, value=-1)
    mean = mean + pilot
    if current == len(x):
        return Pair(mean[:-1], torch.zeros_like(pilot)), Pair(var[:-1], torch.zeros_like(pilot))
    return Pair(mean[:-1], mean[-1]), Pair(var[:-1], var[-1])


def affine(x: Tensor, current: int, mean: Pair, scale: Pair, shift: Pair) -> Tensor:
    """scale · (x − mean) + shift."""
    if _is_small(x, current):
        y, lines = torch.empty_like(x), _lines(x)
        m, a, b = _of_all(x, current, lines, mean, scale, shift)
        out = torch.sub(lines, m, out=_lines(y))
        torch.addcmul(b, out, a, out=out)
        return y
    y, block = torch.empty_like(x), WideBlock()
    for (part, out), (m, a, b) in _blocks_of_lanes((x, y), current, (mean, scale, shift)):
        wide = subtract(part, m, block.like(out))
        write(torch.addcmul(b, wide, a, out=wide), out)
    return y


def sums(g: Tensor, x: Tensor, current: int, mean: Pair) -> tuple[Pair, Pair]:
    """Σ g and Σ g · (x − mean) of every lane and of the past rows."""
    lines, upstream, pilot = _lines(x), _lines(g), mean.lanes[0]
    if _is_small(x, current):
        belongs = _belongs(len(x), current, len(mean.lanes), x.dtype)
        (m,) = _of_all(x, current, lines, mean)
        both = torch.cat([upstream.sum(1), (lines - m).mul_(upstream).sum(1)], 1)
        total, dot = _by_channel(belongs, both, x.shape[1], 2).unbind(1)
        return Pair(total[:-1], total[-1]), Pair(dot[:-1], dot[-1])
    repeated = _repeated(pilot, lines)
    found = x.new_empty(len(x), 2, lines.shape[2], dtype=statistics_dtype(x))
    start, block = 0, WideBlock()
    for part, product, of_rows in _blocks_of_rows(lines, found):
        g_part = block.read(upstream[start : start + len(part)])
        start += len(part)
        subtract(part, repeated, product)
        torch.sum(g_part, 1, out=of_rows[:, 0])
        torch.sum(product.mul_(g_part), 1, out=of_rows[:, 1])
    total, dot = _by_part(found, current, len(mean.lanes), x.shape[1]).unbind(1)
    dot = torch.addcmul(dot, torch.cat([mean.lanes, mean.past[None]]) - pilot, total, value=-1)
    return Pair(total[:-1], total[-1]), Pair(dot[:-1], dot[-1])


def gradient(g: Tensor, x: Tensor, current: int, mean: Pair, of_g: Pair, of_x: Pair, shift: Pair) -> Tensor:
    """of_g · g + of_x · (x − mean) + shift."""
    if _is_small(x, current):
        dx, lines = torch.empty_like(x), _lines(x)
        m, a, b, factor = _of_all(x, current, lines, mean, of_x, shift, of_g)
        out = torch.sub(lines, m, out=_lines(dx))
        torch.addcmul(b, out, a, out=out).addcmul_(_lines(g), factor)
        return dx
    dx, block, another = torch.empty_like(x), WideBlock(), WideBlock()
    for (part, upstream, out), (m, a, b, factor) in _blocks_of_lanes((x, g, dx), current, (mean, of_x, shift, of_g)):
        wide = subtract(part, m, block.like(out))
        torch.addcmul(b, wide, a, out=wide)
        write(wide.addcmul_(another.read(upstream), factor), out)
    return dx


def _is_small(x: Tensor, current: int) -> bool:
    """Whether ``x`` is worked through at once; only with past rows, for CN, which has none, gains nothing by it."""
    return current < len(x) and x.numel() <= SMALL and x.dtype not in HALF


def _of_all(x: Tensor, current: int, lines: Tensor, *values: Pair) -> tuple[Tensor, ...]:
    """Each value for every row, (N, 1, pixels · C)."""
    lanes = len(values[0].lanes)
    stacked = torch.cat([part for value in values for part in (value.lanes, value.past[None])])
    repeated = _repeated(stacked, lines).view(len(values), lanes + 1, 1, -1)
    return repeated.index_select(1, _part(len(x), current, lanes)).unbind()


def _lines(x: Tensor) -> Tensor:
    """(N, lines, pixels · C), as a view."""
    channels, area = x.shape[1], x.shape[2] * x.shape[3]
    pixels = max(p for p in range(1, max(1, LINE // channels) + 1) if area % p == 0)
    return x.permute(0, 2, 3, 1).view(len(x), area // pixels, pixels * channels)


def _repeated(value: Tensor, lines: Tensor) -> Tensor:
    """(..., C) as (..., 1, pixels · C)."""
    pixels = lines.shape[-1] // value.shape[-1]
    return value.unsqueeze(-2).expand(*value.shape[:-1], pixels, -1).flatten(-2).unsqueeze(-2)


def _blocks_of_rows(lines: Tensor, found: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Some rows after another, memory for as many values, the same for all, and what is to be found of the rows."""
    rows = max(1, BLOCK // lines[0].numel())
    work = torch.empty_like(lines[:rows], dtype=found.dtype)
    return ((part, work[: len(part)], out) for part, out in zip(lines.split(rows), found.split(rows), strict=True))


def _blocks_of_lanes(
    tensors: tuple[Tensor, ...], current: int, values: tuple[Pair, ...]
) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """A block of each tensor, and what of ``values`` goes with it: rows of all lanes of current rows, then past rows.

    Where a row of every lane is more than a block, some lines of each.
    """
    every = [_lines(tensor) for tensor in tensors]
    lanes, most = len(values[0].lanes), max(1, BLOCK // every[0][0].numel())
    stacked = torch.cat([part for value in values for part in (value.lanes, value.past[None])])
    repeated = _repeated(stacked.view(len(values), lanes + 1, -1), every[0])
    own, past = repeated[:, :-1].unbind(), repeated[:, -1].unbind()
    parts = (_cut(lines[:current].unflatten(0, (-1, lanes)), max(1, most // lanes)) for lines in every)
    yield from ((part, own) for part in zip(*parts, strict=True))
    if current < len(every[0]):
        yield from ((part, past) for part in zip(*(_cut(lines[current:], most) for lines in every), strict=True))


def _cut(lines: Tensor, rows: int) -> Iterator[Tensor]:
    """So many rows (N, ..., lines, pixels · C) after another; a single one that is more than a block, some lines."""
    fitting = max(1, BLOCK * lines.shape[-2] // max(1, lines[:1].numel()))
    for part in lines.split(rows):
        yield from part.split(fitting, -2) if len(part) == 1 else (part,)


def _by_part(found: Tensor, current: int, lanes: int, channels: int) -> Tensor:
    """Sums (L + 1, 2, C) over the rows of every lane, and over past rows, of two values a row, (N, 2, pixels · C)."""
    return _by_channel(_belongs(len(found), current, lanes, found.dtype), found.flatten(1), channels, 2)


def _by_channel(weights: Tensor, values: Tensor, channels: int, kinds: int = 1) -> Tensor:
    """Weighted sums (L + 1, kinds, C) over rows and pixels of values (N, kinds · pixels · C); weights (L + 1, N)."""
    # Into memory of our own, for within ``torch.autocast`` a product is one of bfloat16 otherwise.
    sums = torch.mm(weights, values, out=values.new_empty(len(weights), values.shape[1]))
    return sums.view(len(weights), kinds, -1, channels).sum(2)


@functools.lru_cache(maxsize=64)
def _share(rows: int, current: int, lanes: int, area: int, dtype: torch.dtype) -> Tensor:
    """What a value of each row (N) counts in the mean of each lane, and of past rows, (L + 1, N)."""
    return _belongs(rows, current, lanes, dtype) / _values_by_part(rows, current, lanes, area, dtype)[:, 0]


@functools.lru_cache(maxsize=64)
def _values_by_part(rows: int, current: int, lanes: int, area: int, dtype: torch.dtype) -> Tensor:
    """How many values of a channel there are in each lane and in past rows, (L + 1, 1, 1); at least one."""
    return _belongs(rows, current, lanes, dtype).sum(1).clamp_(min=1).mul_(area)[:, None, None]


@functools.lru_cache(maxsize=64)
def _belongs(rows: int, current: int, lanes: int, dtype: torch.dtype) -> Tensor:
    """1 where row (N) is one of a lane, or a past row, (L + 1, N); with it a sum over rows is one product."""
    return (_part(rows, current, lanes) == torch.arange(lanes + 1)[:, None]).to(dtype)


@functools.lru_cache(maxsize=64)
def _part(rows: int, current: int, lanes: int) -> Tensor:
    """The lane of each row (N), L for a past one."""
    return torch.where(torch.arange(rows) < current, torch.arange(rows) % lanes, lanes)
