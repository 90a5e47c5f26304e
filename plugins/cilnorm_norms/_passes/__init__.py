"""Moments and affine maps of groups of rows, where the passes over the tensor are done best, and differentiable.

Row j of x (N, C, H, W) belongs to lane j mod L: L = 1 is batch normalisation, L = N instance normalisation. A layer
does its algebra on the (L, C) moments with ordinary autograd and never writes an intermediate of the size of x.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cilnorm_norms._passes import channels_last as _passes_channels_last
from cilnorm_norms._passes import native as _passes_native
from cilnorm_norms._passes import plain as _passes_torch
from cilnorm_norms._passes.plain import Pair


def choose(x: Tensor) -> ModuleType:
    """The module whose ``moments``, ``affine``, ``sums`` and ``gradient`` suit ``x``."""
    for passes in () if torch.compiler.is_compiling() else (_passes_native, _passes_channels_last):
        if passes.suits(x):
            return passes
    return _passes_torch


def like(g: Tensor, x: Tensor) -> Tensor:
    """The gradient ``g`` laid out as ``x`` is."""
    if x.is_contiguous():
        return g.contiguous()
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return g.contiguous(memory_format=torch.channels_last) if channels_last else g


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lanes: int) -> tuple[Tensor, Tensor]:
        mean, var = choose(x).moments(x, len(x), lanes)
        ctx.save_for_backward(x, mean.lanes)
        return mean.lanes, var.lanes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dmean: Tensor, dvar: Tensor) -> tuple[Tensor, None]:
        x, mean = ctx.saved_tensors
        count = x.numel() // mean.numel()
        return choose(x).affine(x, len(x), _alone(mean), _alone(dvar * (2 / count)), _alone(dmean / count)), None


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(x, mean, scale)
        return choose(x).affine(x, len(x), _alone(mean), _alone(scale), _alone(shift))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:
        x, mean, scale = ctx.saved_tensors
        g = like(g, x)
        passes = choose(x)
        total, dot = passes.sums(g, x, len(x), _alone(mean))
        zero = _alone(torch.zeros_like(mean))
        dx = passes.affine(g, len(x), zero, _alone(scale), zero)
        return dx, -scale * total.lanes, dot.lanes, total.lanes


def moments(x: Tensor, lanes: int = 1) -> tuple[Tensor, Tensor]:
    """Means and biased variances (L, C) of the lanes of x (N, C, H, W)."""
    return _Moments.apply(x, lanes)


def affine(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale · (x − mean) + shift for x (N, C, H, W) and (L, C) values; in the precision of x."""
    return _Affine.apply(x, mean, scale, shift)


def _alone(value: Tensor) -> Pair:
    """A value for lanes only, where no row stands apart as past."""
    return Pair(value, torch.zeros_like(value[0]))
