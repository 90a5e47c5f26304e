"""Task-balanced normalisation as one differentiable function that never repeats a row.

With a_s = γ / √(v_s + ε) and b_s = β − a_s μ_s, a current row of split s is a_s x + b_s, and a past row, the mean of
its S normalised copies, is mean_s(a_s) x + mean_s(b_s). So one pass over the input yields the moments, a second one
the output, and the gradients need two passes likewise. What lies between is algebra on (S, C) numbers, in this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cilnorm_norms import _task_balanced_native, _task_balanced_torch
from cilnorm_norms._task_balanced_torch import Pair


@dataclass(frozen=True)
class Plan:
    """A composition reduced to what the layer computes with.

    Attributes:
        rows: rows of the batch.
        current: leading rows that are split; the others are past rows and belong to every split.
        splits: S, groups of current rows; row j is in group j mod S.
        weight: what a current row weighs in the statistics where a past row weighs 1.
        past_gain: what a past row weighs in the gradients of γ and β where a current row weighs 1.
    """

    rows: int
    current: int
    splits: int = 1
    weight: float = 1.0
    past_gain: float = 1.0


@dataclass(frozen=True)
class Moments:
    """Statistics of every split: mean and biased variance (S, C), and the weighted number n of values behind each."""

    mean: Tensor
    var: Tensor
    count: float


class TaskBalancedFunction(torch.autograd.Function):
    """``apply(x, γ, β, ε, plan) -> y, mean_s μ_s, mean_s v_s · n / (n − 1)``; the last two carry no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, plan: Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        passes = choose_passes(x)
        mean, var = passes.moments(x, plan.current, plan.splits)
        split = combine(mean, var, plan, x.shape[2] * x.shape[3])
        inverse = torch.rsqrt(split.var + eps)
        scale = inverse if weight is None else inverse * weight
        shift = torch.zeros_like(scale) if bias is None else bias.expand_as(scale)
        past_scale = scale.mean(0)
        past_shift = (shift + scale * (mean.past - split.mean)).mean(0)
        centre = Pair(split.mean, mean.past)
        y = passes.affine(x, plan.current, centre, Pair(scale, past_scale), Pair(shift, past_shift))
        ctx.save_for_backward(x, weight, bias, split.mean, mean.past, inverse)
        ctx.plan, ctx.count = plan, split.count
        running = split.mean.mean(0), split.var.mean(0) * (split.count / max(split.count - 1, 1))
        ctx.mark_non_differentiable(*running)
        return y, *running

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, split_mean, past_mean, inverse = ctx.saved_tensors
        plan: Plan = ctx.plan
        passes, g = choose_passes(x), g.contiguous(memory_format=memory_format(x))
        centre = Pair(split_mean, past_mean)
        total, dot = passes.sums(g, x, plan.current, centre)
        past_dot = dot.past + (past_mean - split_mean) * total.past  # Σ_past g (x − μ_s), (S, C)
        dweight = dbias = dx = None
        if weight is not None and ctx.needs_input_grad[1]:
            dweight = (inverse * (dot.lanes + plan.past_gain / plan.splits * past_dot)).sum(0).to(weight.dtype)
        if bias is not None and ctx.needs_input_grad[2]:
            dbias = (total.lanes.sum(0) + plan.past_gain * total.past).to(bias.dtype)
        if ctx.needs_input_grad[0]:
            scale = inverse if weight is None else inverse * weight
            pull = scale * (total.lanes + total.past / plan.splits) / ctx.count  # a_s G_s / n
            slope = scale * inverse.square() * (dot.lanes + past_dot / plan.splits) / ctx.count  # a_s i_s² K_s / n
            of_x = Pair(-plan.weight * slope, -slope.sum(0))
            shift = Pair(-plan.weight * pull, -(pull + slope * (past_mean - split_mean)).sum(0))
            dx = passes.gradient(g, x, plan.current, centre, Pair(scale, scale.mean(0)), of_x, shift)
        return dx, dweight, dbias, None, None


def combine(mean: Pair, var: Pair, plan: Plan, area: int) -> Moments:
    """Moments of the union of a split's own rows and all past rows, by Chan's formula.

    E[x²] − μ² would be shorter, and is negative in float32 once |μ| is a thousand deviations.
    """
    own = plan.weight * (plan.current // plan.splits) * area
    shared = float((plan.rows - plan.current) * area)
    count = own + shared
    gap = mean.lanes - mean.past
    return Moments(
        mean=mean.past + gap * (own / count),
        var=(own * var.lanes + shared * var.past + gap.square() * (own * shared / count)) / count,
        count=count,
    )


def choose_passes(x: Tensor) -> ModuleType:
    """Where the four passes over ``x`` are done best."""
    if not torch.compiler.is_compiling() and _task_balanced_native.suits(x):
        return _task_balanced_native
    return _task_balanced_torch


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout of ``x``, which its gradient should have as well."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format
