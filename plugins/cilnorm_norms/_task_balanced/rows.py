"""Task-balanced normalisation of rows in any order, as weights over rows.

With m_j and v_j the moments of row j, split s has the mean μ_s = Σ_j W_sj m_j and the variance v_s = Σ_j W_sj (v_j +
(m_j − μ_s)²). With a_s = γ / √(v_s + ε), row j becomes Σ_s P_js a_s (x − μ_s) + β: of one split for a current row, of
all of them for a past row.

W and P come from the mask alone, by operations on its device: nobody counts on the host, so a GPU is not waited for,
and shapes depend on the number of rows only, so a compiled layer stays compiled.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from cilnorm_norms._base import Ranks
from cilnorm_norms._row_moments import normalise


class Rule(Protocol):
    """How batches are split; equal rules are equal and hash alike, since tables of them are kept."""

    def most(self, rows: int) -> int:
        """A bound on the splits of any batch of so many rows."""

    def __call__(self, current: int, past: int) -> tuple[int, float]:
        """The splits of a batch, and what a past row weighs in the statistics of one where a current row weighs 1."""


@dataclass(frozen=True, eq=False)
class RowPlan:
    """What the layer computes with; N rows of all processes, in the order of ranks.

    Attributes:
        of_rows: W (S, N), what a row weighs in a split's statistics; each line sums to 1, or is 0 where there is no
            such split.
        of_splits: P (N, S), what a split weighs in a row's output.
        average: (S,), 1 over the number of splits.
        count: rows behind a split's statistics, each as heavy as it weighs; a tensor without dimensions.
        gain: (N, 1), 1 in the mean, what a row weighs in the gradients of γ and β; None where all weigh 1.
    """

    of_rows: Tensor
    of_splits: Tensor
    average: Tensor
    count: Tensor
    gain: Tensor | None


@dataclass(eq=False)  # not frozen: torch 2.6 compiles anew for every value of any field of a frozen one
class RowPlanner:
    """Makes the plan when the first layer asks for it; compiled code makes it anew, from the mask of each batch.

    Attributes:
        past: (N,) bool, of the rows of all processes.
        most: a bound on the splits of any batch of so many rows.
        balanced: whether a past row weighs more than a current one in the gradients of γ and β: as many times as there
            are splits, or where there is one, as in the statistics.
        splits, past_weights: (N + 1,), what the rule says of 0, 1, ... past rows; compiled code reads them rather than
            the number of tasks, which would compile it anew for every task.
        plans: those that were made, by type.
    """

    past: Tensor
    most: int
    balanced: bool
    splits: Tensor
    past_weights: Tensor
    plans: dict[torch.dtype, RowPlan] = field(default_factory=dict, repr=False)

    def __deepcopy__(self, memo: object) -> RowPlanner:
        return self

    def plan(self, dtype: torch.dtype) -> RowPlan:
        """The plan, in the type of the statistics."""
        if torch.compiler.is_compiling():
            return self._made(dtype, self.most)
        if dtype not in self.plans:
            on_cpu = self.past.device.type == "cpu"
            most = int(self.splits[self.past.sum()]) if on_cpu else self.most
            self.plans[dtype] = self._made(dtype, most)
        return self.plans[dtype]

    def _made(self, dtype: torch.dtype, most: int) -> RowPlan:
        past = self.past
        own, count = ~past, past.sum()
        # Not splits[count], which would read the index back from the device.
        found, past_weight = (table.index_select(0, count.view(1)) for table in (self.splits, self.past_weights))
        past_weight = past_weight.to(dtype)
        number = torch.arange(most, device=past.device)
        mine = ((own.cumsum(0) - 1).remainder(found) == number[:, None]) & own  # (S, N)
        exists = number < found
        heavy = torch.where(own, 1 / past_weight, 1.0)
        weights = ((mine | past) & exists[:, None]) * heavy
        total = weights.sum(1, keepdim=True)
        average = exists.to(dtype) / found
        times = torch.where(found > 1, found, past_weight)
        return RowPlan(
            of_rows=weights / total.clamp(min=torch.finfo(dtype).tiny),
            of_splits=torch.where(past[:, None], average, mine.T.to(dtype)),
            average=average,
            count=total[0, 0],
            gain=_of_mean_one(torch.where(past, times, 1.0)) if self.balanced else None,
        )


def _of_mean_one(value: Tensor) -> Tensor:
    return (value / value.mean())[:, None]


def plan_rows(past: Tensor, rule: Rule, balanced: bool) -> RowPlanner:
    """A planner for the rows of ``past`` (N,) bool; see there for the rest."""
    tables = _table(rule, len(past), past.device)  # type: ignore[arg-type]  # hashable
    return RowPlanner(past, rule.most(len(past)), balanced, *tables)


@functools.lru_cache(maxsize=256)
def _table(rule: Rule, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What the rule says of 0, 1, ... rows past rows, where the mask is."""
    splits, weights = zip(*(rule(rows - past, past) for past in range(rows + 1)), strict=True)
    return torch.tensor(splits, device=device), torch.tensor(weights, dtype=torch.float64).to(device)


def normalise_rows(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, planner: RowPlanner, ranks: Ranks | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean_s μ_s, mean_s v_s · n / (n − 1); the last two carry no gradient."""

    plan = planner.plan(torch.float64 if x.dtype == torch.float64 else torch.float32)
    y, *statistics = normalise(x, RowAlgebra(plan, eps), ranks, weight, bias)
    mean, var = (each.detach() for each in statistics)
    count = (plan.count * (x.shape[2] * x.shape[3])).to(var.dtype)
    return y, mean, var * (count / (count - 1).clamp(min=1))


@dataclass(frozen=True, eq=False)
class RowAlgebra:
    """Scale, shift (N, C), mean_s μ_s and mean_s v_s (C,) from the moments of rows; the last two carry no gradient."""

    plan: RowPlan
    eps: float

    def __call__(self, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
        gain = self.plan.gain
        weight, bias = (value if value is None else _with_gain(value.to(mean.dtype), gain) for value in (weight, bias))
        scale, shift, centre, split_var = self.forward(mean, var, weight, bias)[0]
        return scale, shift, centre.detach(), split_var.detach()

    def forward(
        self, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """The same, and what ``gradient`` needs."""
        channels, of_rows, of_splits = mean.shape[1], self.plan.of_rows, self.plan.of_splits
        # Around a pilot, since a mean of squares less a squared mean is noise where the mean is large.
        pilot = mean.detach().mean(0)
        mean = mean - pilot
        centre, square, within = (of_rows @ torch.cat([mean, mean.square(), var], 1)).split(channels, 1)
        split_var = within + (square - centre.square()).clamp_min(0)
        inverse = torch.rsqrt(split_var + self.eps)
        plain_scale, offset = (of_splits @ torch.cat([inverse, inverse * centre], 1)).split(channels, 1)
        plain_shift = torch.addcmul(-offset, plain_scale, mean)
        scale, shift = plain_scale, plain_shift
        if weight is not None:
            scale, shift = scale * weight, shift * weight
        if bias is not None:
            shift = shift + bias
        running = (self.plan.average @ torch.cat([centre, split_var], 1)).split(channels)
        kept = mean, centre, inverse, plain_scale, plain_shift, weight, bias
        return (scale, shift, running[0] + pilot, running[1]), kept

    def gradient(
        self, kept: Sequence[Tensor | None], of_scale: Tensor, of_shift: Tensor, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Of mean and var (N, C), γ and β (C,), from those of scale and shift (N, C)."""
        mean, centre, inverse, plain_scale, plain_shift = (value for value in kept[:-2] if value is not None)
        weight, bias = kept[-2:]
        channels, plan = mean.shape[1], self.plan
        dweight = dbias = None
        if weight is not None:
            each = torch.addcmul(of_scale * plain_scale, of_shift, plain_shift)
            dweight = self._summed(each).to(weight.dtype)
        if bias is not None:
            dbias = self._summed(of_shift).to(bias.dtype)
        if weight is not None:
            of_scale, of_shift = of_scale * weight, of_shift * weight
        of_rows = torch.cat([torch.addcmul(of_scale, of_shift, mean), of_shift], 1)
        of_inverse, pull = (plan.of_splits.T @ of_rows).split(channels, 1)
        of_var = torch.addcmul(of_inverse, pull, centre, value=-1) * inverse.pow(3) * -0.5
        of_centre = torch.addcmul(pull * inverse, centre, of_var, value=2).neg_()
        dmean, dvar = (plan.of_rows.T @ torch.cat([of_centre, of_var], 1)).split(channels, 1)
        dmean = torch.addcmul(torch.addcmul(dmean, mean, dvar, value=2), of_shift, plain_scale)
        return dmean, dvar, dweight, dbias

    def _summed(self, value: Tensor) -> Tensor:
        return (value if self.plan.gain is None else value * self.plan.gain).sum(0)


def _with_gain(value: Tensor, gain: Tensor | None) -> Tensor:
    """The value (C,) itself, with a gradient that counts a row as often as ``gain`` (N, 1) says."""
    return value if gain is None else value + (gain - 1) * (value - value.detach())
