"""Task-balanced normalisation as Triton kernels: no copy of the input and no repeat, whatever the number of splits.

    row_moments      x            -> mean and variance of every row                          (N, C)
    split_moments    of rows      -> mean, variance and 1 / √(v + ε) of every split          (S, C)
    apply            x            -> y, and what the running averages move to
    row_sums         g, x         -> Σ g and Σ g (x − centre) of every row                   (N, C)
    split_gradients  of rows      -> the terms of dx, and each split's share of dγ and dβ    (S, C)
    apply_gradient   g, x         -> dx

A program of a row kernel looks at some channels of one row. x, g, y and dx may be contiguous or channels-last, in
float32, float16 or bfloat16; everything between is float32. The formulas are those of ``_task_balanced_function``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from cilnorm_norms._task_balanced import kernels as kernels

TILE = 1024  # elements that a program of a row kernel holds at a time
CHANNELS = 16  # that a program of a split kernel looks at


class Splits(NamedTuple):
    """Mean, variance and inverse deviation of every split (S, C), mean of the past rows (C,)."""

    mean: Tensor
    var: Tensor
    inverse: Tensor
    past_mean: Tensor


class Sizes(NamedTuple):
    """Of a batch: rows N, leading rows that are split, number of splits S, channels C, pixels H · W."""

    rows: int
    current: int
    splits: int
    channels: int
    area: int

    def weighted(self, weight: float) -> float:
        """Weighted number n of values behind a split's statistics."""
        return (weight * (self.current // self.splits) + self.rows - self.current) * self.area


def suits(x: Tensor) -> bool:
    """Whether the kernels can read ``x`` where it lies."""
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    return x.is_cuda and dense and x.dtype in (torch.float32, torch.float16, torch.bfloat16) and x.numel() > 0


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, sizes: Sizes, current_weight: float
) -> tuple[Tensor, Splits, tuple[Tensor, Tensor]]:
    """Output, what the backward pass needs, and the mean and unbiased variance that the running averages move to.

    Args:
        x: (N, C, H, W).
        current_weight: what a current row weighs in the statistics where a past row weighs 1.
    """
    rows, _, splits, channels, area = sizes
    y = torch.empty_like(x)
    row_mean, row_var = x.new_empty(2, rows, channels, dtype=torch.float32)
    mean, var, inverse = x.new_empty(3, splits, channels, dtype=torch.float32)
    found = Splits(mean, var, inverse, x.new_empty(channels, dtype=torch.float32))
    running = x.new_empty(2, channels, dtype=torch.float32)
    count = sizes.weighted(current_weight)
    own_share = current_weight * (sizes.current // splits) * area / count
    grid, layout, tile = row_programs(x)
    with on_device(x):
        kernels.row_moments[grid](x, row_mean, row_var, channels, area, *layout, **tile)
        kernels.split_moments[split_programs(sizes)](
            row_mean, row_var, *found, *sizes[:4], own_share, eps, **split_tile(sizes)
        )
        kernels.apply[grid](
            *(x, y, weight, bias, *found, running, *sizes[1:], count / max(count - 1, 1), *layout),
            BLOCK_S=triton.next_power_of_2(splits),
            **tile,
        )
    return y, found, (running[0], running[1])


def backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    found: Splits,
    sizes: Sizes,
    current_weight: float,
    gains: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (N, C, H, W), dγ and dβ (C,), the last two in float32.

    Args:
        g: gradient of the output, laid out as ``x``.
        gains: what a current and a past row weigh in dγ and dβ.
    """
    rows, _, splits, channels, _ = sizes
    dx = torch.empty_like(x)
    total, dot = x.new_empty(2, rows, channels, dtype=torch.float32)
    pull, slope, dweight, dbias = terms = x.new_empty(4, splits, channels, dtype=torch.float32)
    grid, layout, tile = row_programs(x)
    with on_device(x):
        kernels.row_sums[grid](g, x, found.mean, found.past_mean, total, dot, *sizes[1:], *layout, **tile)
        kernels.split_gradients[split_programs(sizes)](
            *(total, dot, weight, found.mean, found.inverse, found.past_mean, pull, slope, dweight, dbias),
            *(*sizes[:4], 1 / sizes.weighted(current_weight), gains[0], gains[1] / splits),
            **split_tile(sizes),
        )
        kernels.apply_gradient[grid](
            *(g, x, dx, weight, found.mean, found.inverse, found.past_mean, pull, slope),
            *(*sizes[1:], current_weight, *layout),
            BLOCK_S=triton.next_power_of_2(splits),
            **tile,
        )
    dweight, dbias = terms[2:].sum(1)
    return dx, dweight, dbias


def row_programs(x: Tensor) -> tuple[tuple[int, int], tuple[int, int, int], dict[str, int]]:
    """Grid, strides of rows, channels and pixels, and tile of a row kernel; long on the innermost axis."""
    rows, channels, height, width = x.shape
    area = height * width
    if x.is_contiguous():
        pixels = min(triton.next_power_of_2(area), TILE)
        block = min(triton.next_power_of_2(channels), TILE // pixels)
        strides = channels * area, area, 1
    else:
        block = min(triton.next_power_of_2(channels), 128)
        pixels = min(triton.next_power_of_2(area), TILE // block)
        strides = channels * area, 1, channels
    return (rows, triton.cdiv(channels, block)), strides, {"BLOCK_C": block, "BLOCK_P": pixels}


def split_programs(sizes: Sizes) -> tuple[int, int]:
    """Grid of a split kernel."""
    return sizes.splits, triton.cdiv(sizes.channels, CHANNELS)


def split_tile(sizes: Sizes) -> dict[str, int]:
    """Tile of a split kernel: all of a split's rows, all past rows."""
    own, past = sizes.current // sizes.splits, max(sizes.rows - sizes.current, 1)
    return {
        "BLOCK_OWN": triton.next_power_of_2(own),
        "BLOCK_PAST": triton.next_power_of_2(past),
        "BLOCK_C": CHANNELS,
    }


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which needn't be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
