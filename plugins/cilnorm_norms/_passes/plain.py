"""The four passes over a tensor that the layers here are made of, in plain torch: any device, layout and compiler.

Shapes: x, g (N, C, H, W) with ``current`` leading rows; row j of them belongs to lane j mod L. values of lanes are
(L, C), those of past rows (C,). Everything but x and g is in the precision of the statistics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Pair(NamedTuple):
    """A value for the lanes (L, C) of the current rows and one for the past rows (C,)."""

    lanes: Tensor
    past: Tensor


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Half precision is too coarse for sums; everything else keeps its own."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def moments(x: Tensor, current: int, lanes: int) -> tuple[Pair, Pair]:
    """Means and biased variances of every lane and of the past rows (zeros where there are none)."""
    lane_rows, past_rows = _cut(x, current, lanes)
    lane_var, lane_mean = torch.var_mean(lane_rows, (0, 3, 4), correction=0)
    if current == x.shape[0]:
        zeros = lane_mean.new_zeros(x.shape[1])
        return Pair(lane_mean, zeros), Pair(lane_var, zeros)
    past_var, past_mean = torch.var_mean(past_rows, (0, 2, 3), correction=0)
    return Pair(lane_mean, past_mean), Pair(lane_var, past_var)


def affine(x: Tensor, current: int, mean: Pair, scale: Pair, shift: Pair) -> Tensor:
    """scale · (x − mean) + shift."""
    lane_rows, past_rows = _cut(x, current, len(mean.lanes))
    lane_y = (lane_rows - _wide(mean.lanes)) * _wide(scale.lanes) + _wide(shift.lanes)
    past_y = (past_rows - _wide(mean.past)) * _wide(scale.past) + _wide(shift.past)
    return _join(lane_y, past_y, x)


def sums(g: Tensor, x: Tensor, current: int, mean: Pair) -> tuple[Pair, Pair]:
    """Σ g and Σ g · (x − mean) of every lane and of the past rows."""
    lane_g, past_g = _cut(g, current, len(mean.lanes))
    lane_x, past_x = _cut(x, current, len(mean.lanes))
    total = Pair(lane_g.sum((0, 3, 4)), past_g.sum((0, 2, 3)))
    lane_dot = (lane_g * (lane_x - _wide(mean.lanes))).sum((0, 3, 4))
    past_dot = (past_g * (past_x - _wide(mean.past))).sum((0, 2, 3))
    return total, Pair(lane_dot, past_dot)


def gradient(g: Tensor, x: Tensor, current: int, mean: Pair, of_g: Pair, of_x: Pair, shift: Pair) -> Tensor:
    """of_g · g + of_x · (x − mean) + shift."""
    lane_g, past_g = _cut(g, current, len(mean.lanes))
    lane_x, past_x = _cut(x, current, len(mean.lanes))
    lane_d = (lane_x - _wide(mean.lanes)) * _wide(of_x.lanes) + _wide(shift.lanes)
    past_d = (past_x - _wide(mean.past)) * _wide(of_x.past) + _wide(shift.past)
    return _join(lane_d + lane_g * _wide(of_g.lanes), past_d + past_g * _wide(of_g.past), x)


def _cut(x: Tensor, current: int, lanes: int) -> tuple[Tensor, Tensor]:
    """Current rows (M, L, C, H, W) and past rows (P, C, H, W), in the precision of the statistics."""
    x = x.to(statistics_dtype(x))
    return x[:current].unflatten(0, (-1, lanes)), x[current:]


def _join(current: Tensor, past: Tensor, like: Tensor) -> Tensor:
    """The rows in one tensor of the input's precision; what is elementwise keeps its layout, and so does ``cat``."""
    return torch.cat([current.flatten(0, 1), past]).to(like.dtype)


def _wide(value: Tensor) -> Tensor:
    return value[..., None, None]
