"""The four passes over a tensor on torch's own batch-norm kernels, for contiguous tensors on the CPU.

Current rows (N_c, C, H, W) viewed as (N_c / L, L · C, H, W) are what batch norm knows: a channel a lane. Its statistics
kernel yields the moments, its inference mode an affine map a channel, and the backward of that mode the two sums.
They read the input where it lies; the elementwise form in ``_passes_torch`` needs five times as long.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cilnorm_norms._passes.blocks import HALF, WideBlock, write
from cilnorm_norms._passes.plain import Pair, statistics_dtype

aten = torch.ops.aten
BLOCK = 256 * 1024  # values; a megabyte each of input, gradient and what is written


def suits(x: Tensor) -> bool:
    """Whether these kernels can read ``x`` where it lies."""
    right_type = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64, *HALF)
    return right_type and x.is_contiguous() and x.numel() > 0


def moments(x: Tensor, current: int, lanes: int) -> tuple[Pair, Pair]:
    """Means and biased variances of every lane and of the past rows (zeros where there are none)."""
    means, variances, dtype = [], [], statistics_dtype(x)
    for part, shape in zip(_cut(x, current, lanes), ((lanes, -1), (-1,)), strict=True):
        if part.shape[0]:
            # Of half precision the kernel makes float32 statistics where there are averages of float32.
            averages = x.new_zeros(part.shape[1], dtype=dtype) if x.dtype in HALF else None
            mean, var = torch.batch_norm_update_stats(part, averages, averages, 0.0)
        else:
            mean = var = x.new_zeros(part.shape[1], dtype=dtype)
        means.append(mean.view(shape))
        variances.append(var.view(shape))
    return Pair(*means), Pair(*variances)


def affine(x: Tensor, current: int, mean: Pair, scale: Pair, shift: Pair) -> Tensor:
    """scale · (x − mean) + shift."""
    y = torch.empty_like(x)
    lanes = len(mean.lanes)
    for part, out, m, a, b in zip(_cut(x, current, lanes), _cut(y, current, lanes), mean, scale, shift, strict=True):
        _affine(part, out, m, a, b)
    return y


def _affine(x: Tensor, out: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> None:
    """The map of x (N, C, H, W) into ``out``, with a value a channel."""
    if x.shape[0]:
        mean, unused = mean.reshape(-1), mean.new_empty(0)
        aten.native_batch_norm.out(
            *(x, scale.reshape(-1), shift.reshape(-1), mean, torch.ones_like(mean), False, 0.0, 0.0),
            out=out,
            save_mean=unused,
            save_invstd=unused,
        )


def sums(g: Tensor, x: Tensor, current: int, mean: Pair) -> tuple[Pair, Pair]:
    """Σ g and Σ g · (x − mean) of every lane and of the past rows."""
    totals, dots = [], []
    lanes = len(mean.lanes)
    for part_g, part_x, m in zip(_cut(g, current, lanes), _cut(x, current, lanes), mean, strict=True):
        if part_x.shape[0]:
            flat = m.reshape(-1)
            ones = torch.ones_like(flat)
            _, dot, total = aten.native_batch_norm_backward(
                part_g, part_x, None, flat, ones, None, None, False, 0.0, [False, True, True]
            )
        else:
            total = dot = torch.zeros_like(m)
        totals.append(total.view_as(m))
        dots.append(dot.view_as(m))
    return Pair(*totals), Pair(*dots)


def gradient(g: Tensor, x: Tensor, current: int, mean: Pair, of_g: Pair, of_x: Pair, shift: Pair) -> Tensor:
    """of_g · g + of_x · (x − mean) + shift."""
    dx, block, another = torch.empty_like(x), WideBlock(), WideBlock()
    lanes = len(mean.lanes)
    tensors = (_cut(tensor, current, lanes) for tensor in (x, g, dx))
    for parts, values in zip(zip(*tensors, strict=True), zip(mean, of_g, of_x, shift, strict=True), strict=True):
        # A block at a time, so that what the first operation wrote is still in the cache when the second one asks.
        for (some, upstream, out), (m, factor, a, b) in _blocks(parts, [value.reshape(-1) for value in values]):
            wide = block.like(out)
            _affine(another.read(some), wide, m, a, b)
            write(wide.addcmul_(another.read(upstream), factor.view(1, -1, 1, 1)), out)
    return dx


def _blocks(
    tensors: tuple[Tensor, ...], values: list[Tensor]
) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """Some rows of each tensor (N, C, H, W), or some channels of one, and of each value (C,) what goes with them."""
    rows = max(1, BLOCK * len(tensors[0]) // max(tensors[0].numel(), 1))
    channels = max(1, BLOCK * tensors[0].shape[1] // max(tensors[0][:1].numel(), 1))
    for some in zip(*(tensor.split(rows) for tensor in tensors), strict=True):
        if len(some[0]) > 1:
            yield some, tuple(values)
        else:
            cut = zip(*(each.split(channels, 1) for each in some), strict=True)
            yield from zip(cut, zip(*(value.split(channels) for value in values), strict=True), strict=True)


def _cut(x: Tensor, current: int, lanes: int) -> tuple[Tensor, Tensor]:
    """Current rows (M, L · C, H, W) and past rows (P, C, H, W), as views."""
    rows, channels, height, width = x.shape
    own, past = x.split([current, rows - current])
    return own.view(-1, lanes * channels, height, width), past
