"""Task-balanced normalisation as one differentiable function that never repeats a row.

With a_s = γ / √(v_s + ε) and b_s = β − a_s μ_s, a current row of split s is a_s x + b_s, and a past row, the mean of
its S normalised copies, is mean_s(a_s) x + mean_s(b_s). So one pass over the input yields the moments, a second one
the output, and the gradients need two passes likewise. What lies between is algebra on (S, C) numbers, in this file.

Rows of a split may lie on several ranks. Then a rank's lanes are finer than the splits where they must be.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cilnorm_norms import _passes
from cilnorm_norms._base import Ranks
from cilnorm_norms._passes.plain import Pair


@dataclass(frozen=True)
class Plan:
    """A composition reduced to what the layer computes with.

    Attributes:
        rows: rows of the batch that this process holds.
        current: leading rows that are split; the others are past rows and belong to every split.
        splits: S, groups of current rows; row j of those of all ranks, in order, is in group j mod S.
        weight: what a current row weighs in the statistics where a past row weighs 1.
        current_gain, past_gain: what a current and a past row weigh in the gradients of γ and β.
    """

    rows: int
    current: int
    splits: int = 1
    weight: float = 1.0
    current_gain: float = 1.0
    past_gain: float = 1.0

    def lanes(self, ranks: Ranks | None) -> int:
        """Groups in which this process can look at its current rows such that none is in two splits."""
        return self.splits if not ranks or self.current % self.splits == 0 else self.current

    def split_of_lane(self, ranks: Ranks | None, device: torch.device) -> Tensor | None:
        """The split of each lane; None where lanes are splits."""
        if ranks is None or self.current % self.splits == 0:
            return None
        return (torch.arange(self.current, device=device) + ranks.index * self.current) % self.splits


@dataclass(frozen=True)
class Moments:
    """Mean and biased variance (S, C) of every split, and the weighted number n of values behind each."""

    mean: Tensor
    var: Tensor
    count: float


class TaskBalancedFunction(torch.autograd.Function):
    """``apply(x, γ, β, ε, plan, ranks) -> y, mean_s μ_s, mean_s v_s · n / (n − 1)``; the last two carry no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, plan: Plan, ranks: Ranks | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.plan, ctx.ranks = plan, ranks
        if not ranks and wants_triton(x):
            return forward_by_triton(ctx, x, weight, bias, eps)
        passes, area = _passes.choose(x), x.shape[2] * x.shape[3]
        mean, var = passes.moments(x, plan.current, plan.lanes(ranks))
        if ranks:
            mean, var = pool(mean, var, plan, ranks)
        split = combine(mean, var, plan, area, ranks.size if ranks else 1)
        inverse = torch.rsqrt(split.var + eps)
        scale = inverse if weight is None else inverse * weight
        shift = scale.new_zeros(()) if bias is None else bias.to(scale.dtype)
        past_shift = torch.addcmul(shift, scale, mean.past - split.mean).mean(0)
        split_of_lane = plan.split_of_lane(ranks, x.device)
        y = passes.affine(
            x,
            plan.current,
            Pair(spread(split.mean, split_of_lane), mean.past),
            Pair(spread(scale, split_of_lane), scale.mean(0)),
            Pair(spread(shift.expand_as(scale), split_of_lane), past_shift),
        )
        ctx.save_for_backward(x, weight, bias, split.mean, mean.past, inverse)
        ctx.by_triton, ctx.count = False, split.count
        running_mean, running_var = torch.stack([split.mean, split.var]).mean(1)
        running = running_mean, running_var * (split.count / max(split.count - 1, 1))
        ctx.mark_non_differentiable(*running)
        return y, *running

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.by_triton:
            return backward_by_triton(ctx, g)
        x, weight, bias, mean, past_mean, inverse = ctx.saved_tensors
        plan: Plan = ctx.plan
        ranks: Ranks | None = ctx.ranks
        passes, g = _passes.choose(x), _passes.like(g, x)
        split_of_lane = plan.split_of_lane(ranks, x.device)
        centre, gap = Pair(spread(mean, split_of_lane), past_mean), past_mean - mean
        total, dot = passes.sums(g, x, plan.current, centre)
        own, own_dot = fold(total.lanes, split_of_lane, plan.splits), fold(dot.lanes, split_of_lane, plan.splits)
        past_dot = torch.addcmul(dot.past, gap, total.past)  # Σ_past g (x − μ_s)
        share, gain = 1 / plan.splits, plan.past_gain / plan.splits
        dweight = dbias = dx = None
        if weight is not None and ctx.needs_input_grad[1]:
            dweight = (inverse * torch.add(gained(own_dot, plan), past_dot, alpha=gain)).sum(0).to(weight.dtype)
        if bias is not None and ctx.needs_input_grad[2]:
            dbias = torch.add(gained(own, plan), total.past, alpha=gain).sum(0).to(bias.dtype)
        if ctx.needs_input_grad[0]:
            # G_s and K_s, and from them −a_s G_s / n and −a_s i_s² K_s / n.
            sums = torch.stack([torch.add(own, total.past, alpha=share), torch.add(own_dot, past_dot, alpha=share)])
            scale = inverse if weight is None else inverse * weight
            pull, slope = (ranks.sum(sums) if ranks else sums) * (scale * (-1 / ctx.count))
            slope = slope * inverse.square()
            past_shift = torch.addcmul(pull, slope, gap).sum(0)
            dx = passes.gradient(
                g,
                x,
                plan.current,
                centre,
                of_g=Pair(spread(scale, split_of_lane), scale.mean(0)),
                of_x=Pair(spread(weigh(slope, plan), split_of_lane), slope.sum(0)),
                shift=Pair(spread(weigh(pull, plan), split_of_lane), past_shift),
            )
        return dx, dweight, dbias, None, None, None


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported; torch brings it along on some platforms only."""
    return importlib.util.find_spec("triton") is not None


def wants_triton(x: Tensor) -> bool:
    """Whether the kernels are the best choice for ``x``; a compiler makes its own from the plain passes."""
    if torch.compiler.is_compiling() or not x.is_cuda or not has_triton():
        return False
    from cilnorm_norms._task_balanced import triton as _task_balanced_triton

    return _task_balanced_triton.suits(x)


def forward_by_triton(
    ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward pass by ``_task_balanced_triton``."""
    from cilnorm_norms._task_balanced import triton as by_triton

    plan: Plan = ctx.plan
    sizes = by_triton.Sizes(plan.rows, plan.current, plan.splits, x.shape[1], x.shape[2] * x.shape[3])
    y, found, running = by_triton.forward(x, weight, bias, eps, sizes, plan.weight)
    ctx.save_for_backward(x, weight, *found)
    ctx.by_triton, ctx.sizes = True, sizes
    ctx.mark_non_differentiable(*running)
    return y, *running


def backward_by_triton(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """The backward pass by ``_task_balanced_triton``."""
    from cilnorm_norms._task_balanced import triton as by_triton

    plan: Plan = ctx.plan
    x, weight, *found = ctx.saved_tensors
    splits = by_triton.Splits(*found)
    dx, dweight, dbias = by_triton.backward(
        _passes.like(g, x), x, weight, splits, ctx.sizes, plan.weight, (plan.current_gain, plan.past_gain)
    )
    if weight is None:
        return dx, None, None, None, None, None
    return dx, dweight.to(weight.dtype), dbias.to(weight.dtype), None, None, None


def combine(mean: Pair, var: Pair, plan: Plan, area: int, ranks: int = 1) -> Moments:
    """Moments of the union of a split's own rows and all past rows, by Chan's formula.

    E[x²] − μ² would be shorter, and is negative in float32 once |μ| is a thousand deviations.
    """
    own = plan.weight * (ranks * plan.current // plan.splits) * area
    shared = float(ranks * (plan.rows - plan.current) * area)
    count = own + shared
    gap = mean.lanes - mean.past
    within = torch.lerp(var.past, var.lanes, own / count)
    return Moments(
        mean=torch.lerp(mean.past, mean.lanes, own / count),
        var=torch.addcmul(within, gap, gap, value=own * shared / count**2),
        count=count,
    )


def pool(mean: Pair, var: Pair, plan: Plan, ranks: Ranks) -> tuple[Pair, Pair]:
    """Moments of the splits and of the past rows over all ranks; every lane has as many values as any other."""
    own = torch.cat([mean.lanes, mean.past[None], var.lanes, var.past[None]])
    means, variances = ranks.gather(own).chunk(2, dim=1)
    # Lanes in the order of ranks take turns in the splits, whether a rank's lanes are splits or rows.
    lane_means = means[:, :-1].reshape(-1, plan.splits, means.shape[-1])
    lane_variances = variances[:, :-1].reshape(lane_means.shape)
    pooled = Pair(lane_means.mean(0), means[:, -1].mean(0))
    return pooled, Pair(
        (lane_variances + (lane_means - pooled.lanes).square()).mean(0),
        (variances[:, -1] + (means[:, -1] - pooled.past).square()).mean(0),
    )


def weigh(value: Tensor, plan: Plan) -> Tensor:
    """What reaches a current row of what reaches its split."""
    return value if plan.weight == 1 else value * plan.weight


def gained(value: Tensor, plan: Plan) -> Tensor:
    """What the current rows of a split add to the gradients of γ and β."""
    return value if plan.current_gain == 1 else value * plan.current_gain


def spread(value: Tensor, split_of_lane: Tensor | None) -> Tensor:
    """The value of every lane (L, C) from that of every split (S, C)."""
    return value if split_of_lane is None else value[split_of_lane]


def fold(value: Tensor, split_of_lane: Tensor | None, splits: int) -> Tensor:
    """The sum over each split's lanes: (L, C) to (S, C)."""
    if split_of_lane is None:
        return value
    return value.new_zeros(splits, value.shape[1]).index_add_(0, split_of_lane, value)
