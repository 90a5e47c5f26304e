"""Task-balanced batch normalisation: statistics in which the current task and every past one weigh about the same.

A batch of B_c current and B_p past rows after t learned tasks is looked at as r splits, each of every r-th current row
and all past rows, so that B_c / r : B_p / t comes near 1 : 1. With a_s = γ / √(v_s + ε), where μ_s and v_s are the
moments of split s,

    current row j:  y = a_s (x − μ_s) + β,  s = j mod r            past row:  y = mean_s [a_s (x − μ_s)] + β

and the running averages follow mean_s μ_s and mean_s v_s n / (n − 1). Evaluation is batch normalisation.

Cha et al., "Rebalancing Batch Normalization for Exemplar-based Class-Incremental Learning", CVPR 2023,
https://arxiv.org/abs/2201.12559. The paper wants r = t · B_c / B_p. The released code takes the largest common
divisor of B_c and B_p not above it, which leaves the current task 1.1 to 1.9 times the weight of a past one at 48 : 16;
that is ``splits="released"``, because the published numbers have it. In that code γ and β get the gradient of the
averaged copies, in which past rows weigh no more than current ones, unlike the paper says. With
``affine_gradient="balanced"`` a past row weighs r times a current one there, and a row 1 in the mean, lest the step
grow with r:

    dγ = Σ_j w_j g_j x̂_j,   dβ = Σ_j w_j g_j,   w_past = r w_cur,   B_c w_cur + B_p w_past = B_c + B_p

with x̂ the normalised row (of a past one the mean over splits) and g the gradient of the output; dx stays as it is.

t counts tasks, whatever their size. After a first task of 50 classes and before one of 10, t = 1, so those 50 classes
together weigh what the 10 new ones weigh. With ``unit="classes"`` t is old / new classes, 5 there, and every class
weighs about the same; where all tasks are of one size the two are one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from cilnorm.batch import Composition, CompositionAware
from cilnorm.hookspecs import Norm, hookimpl
from cilnorm.rows_aware import Rows, RowsAware
from cilnorm_norms._base import BatchNormBase, Ranks, check_images
from cilnorm_norms._task_balanced import check as _task_balanced_check
from cilnorm_norms._task_balanced.function import Plan, TaskBalancedFunction
from cilnorm_norms._task_balanced.rows import RowPlanner, normalise_rows, plan_rows

SplitRule = Literal["released", "divisor", "exact", "auto"]
AffineGradient = Literal["released", "balanced"]
Unit = Literal["tasks", "classes"]
Mixture = Literal["balanced", "batch"]


def past_units(task: int, classes: tuple[int, int] | None, unit: Unit) -> int | Fraction:
    """t: how many tasks were learned before, or how many of the current one's size their classes make.

    Raises:
        ValueError: classes are to be counted and nobody said how many there are.
    """
    if unit == "tasks" or not task:
        return task
    if classes is None or min(classes) < 1:
        raise ValueError(
            "unit='classes' needs the numbers of old and new classes: Composition(..., classes=(old, new)) or "
            "cilnorm.rows(..., classes=(old, new))"
        )
    return Fraction(*classes)


def feasible_splits(composition: Composition, rule: SplitRule | int, units: int | Fraction | None = None) -> int:
    """The number of splits for a batch.

    Args:
        composition: what the batch is made of.
        rule: ``released``: the largest common divisor of the current and the past rows not above r = task · current /
            past; ``divisor``: the largest divisor of the current rows not above r; ``exact``: 1, for current rows weigh
            1 / r instead of being split; ``auto``: ``released`` where that comes as near to r as it does for the
            paper's batches, more than half of it, else ``exact``; an integer: that many.
        units: t of ``past_units`` in the place of the composition's task.

    Returns:
        1 where there is nothing to balance: no past rows, no current rows, or no task learned before.

    Raises:
        ValueError: an integer that doesn't divide the current rows.
    """
    current, past, task = composition.current, composition.past, composition.task if units is None else units
    if not (current and past and task) or rule == "exact":
        return 1
    if isinstance(rule, int):
        if current % rule:
            raise ValueError(f"{current} current rows can't be cut into {rule} splits")
        return rule
    pool = current if rule == "divisor" else math.gcd(current, past)
    found = max((d for d in range(1, pool + 1) if pool % d == 0 and d * past <= task * current), default=1)
    return 1 if rule == "auto" and _too_few(found, composition, task) else found


def weighs_rows(composition: Composition, rule: SplitRule | int, units: int | Fraction | None = None) -> bool:
    """Whether current rows weigh 1 / r in such a batch instead of being split."""
    current, past, task = composition.current, composition.past, composition.task if units is None else units
    if not (current and past and task) or rule not in ("exact", "auto"):
        return False
    return rule == "exact" or _too_few(feasible_splits(composition, "released", task), composition, task)


def _too_few(splits: int, composition: Composition, units: int | Fraction) -> bool:
    """Whether so many splits leave the current task twice the weight of a past one, or more.

    At 48 : 16 the released code stays below 1.9 times.
    """
    return 2 * splits * composition.past <= units * composition.current


@dataclass(frozen=True)
class RowRule:
    """The rule for batches after ``task`` learned tasks, or such units, whatever their numbers of rows."""

    splits: SplitRule | int
    task: int | Fraction
    mixture: Mixture = "balanced"

    def most(self, rows: int) -> int:
        """A bound on the splits of any batch of so many rows."""
        if isinstance(self.splits, int):
            return self.splits
        return {"exact": 1, "divisor": max(rows - 1, 1)}.get(self.splits, max(rows // 2, 1))

    def __call__(self, current: int, past: int) -> tuple[int, float]:
        """The splits of a batch, and what a past row weighs in the statistics of one where a current row weighs 1."""
        if isinstance(self.splits, int):  # whether it divides the current rows is looked at where they are known
            splits, exact = (self.splits if current and past and self.task else 1), False
        elif not self.task:
            splits, exact = 1, False
        else:
            composition = Composition(current, past, 1)
            splits = feasible_splits(composition, self.splits, self.task)
            exact = weighs_rows(composition, self.splits, self.task)
        if self.mixture == "batch":
            return splits, 1 / splits
        return splits, float(self.task * current / past) if exact else 1.0


class TaskBalancedBatchNorm2d(BatchNormBase, CompositionAware, RowsAware):
    """Task-balanced batch normalisation of (N, C, H, W), https://arxiv.org/abs/2201.12559.

    For training the layer must know what the batch is made of: ``cilnorm.set_composition`` where rows stand current
    first, ``cilnorm.rows`` in any order. Where both say the same, outputs, gradients and averages agree to rounding
    (1e-6 in float32); rows that happen to stand current first, on the CPU, agree to the bit. Its state is that of
    ``BatchNorm2d``; the composition is no part of it.

    Args:
        num_features: C.
        splits (r): how current rows are balanced against past ones. ``released``: as the released code does, splits in
            a number that divides current and past rows. ``divisor``: splits in a number that divides the current rows.
            ``exact``: no splits, every task has the same weight: moments of all rows, a current one weighing 1 / r,
            r = task · current / past. ``auto``: ``released`` where that leaves the current task less than twice the
            weight of a past one, else ``exact``. A number: that many splits. See ``feasible_splits``.
        affine_gradient: how rows weigh in the gradients of γ and β. ``released``: all weigh 1; ``balanced``: a past row
            weighs r times a current one, all rows 1 in the mean; r is the number of splits, with ``exact`` the r above.
        unit (t): what weighs the same as what: ``tasks``: each past task as the current one, however many classes they
            have; ``classes``: each old class as each new one. The same where all tasks are of one size.

    Raises:
        ValueError: another option than these, an input that isn't (N, C, H, W), a batch of another size than the
            composition's.
        RuntimeError: training without a composition.

    Attributes:
        mixture: of what rows the statistics of a split are: ``balanced``: its current rows and all past ones;
            ``batch``: in these a current row weighs r times as much, so that they are the batch's mixture.
        split_rules: the names that ``splits`` may have.
    """

    mixture: ClassVar[Mixture] = "balanced"
    split_rules: ClassVar[tuple[str, ...]] = get_args(SplitRule)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        splits: SplitRule | int = "released",
        affine_gradient: AffineGradient = "released",
        unit: Unit = "tasks",
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if splits not in self.split_rules and not (isinstance(splits, int) and splits > 0):
            raise ValueError(f"splits can't be {splits!r}; it is one of {self.split_rules} or a number of splits")
        if affine_gradient not in get_args(AffineGradient):
            raise ValueError(f"affine_gradient can't be {affine_gradient!r}; it is one of {get_args(AffineGradient)}")
        if unit not in get_args(Unit):
            raise ValueError(f"unit can't be {unit!r}; it is one of {get_args(Unit)}")
        self.splits: SplitRule | int = splits
        self.affine_gradient, self.unit = affine_gradient, unit
        self.plan: Plan | None = None

    def compose(self, composition: Composition) -> None:
        """Says what the next training batches are made of, current rows first.

        Raises:
            ValueError: a fixed number of splits that doesn't divide the current rows.
        """
        RowsAware.forget(self)
        self.plan, self.doubt = self._plan_of(composition), self._doubt_of(composition)

    def _plan_of(self, composition: Composition) -> Plan:
        rows, current, past = composition.rows, composition.current, composition.past
        if not (current and past):
            return Plan(rows, rows)
        ranks = self.ranks()
        size = ranks.size if ranks else 1
        everywhere = Composition(size * current, size * past, composition.task)
        units = past_units(composition.task, composition.classes, self.unit)
        splits = feasible_splits(everywhere, self.splits, units)
        exact, ratio = weighs_rows(everywhere, self.splits, units), float(units * current / past)
        weight = 1 / ratio if exact else float(splits) if self.mixture == "batch" else 1.0
        if splits == 1 and weight == 1:
            return Plan(rows, rows)
        if self.affine_gradient == "released":
            return Plan(rows, current, splits, weight)
        times = ratio if exact else float(splits)
        mean = (current + times * past) / rows
        return Plan(rows, current, splits, weight, 1 / mean, times / mean)

    def _doubt_of(self, composition: Composition) -> str | None:
        """Why the layer can't balance such batches, if it can't."""
        current, past = composition.current, composition.past
        if not (current and past) or self.splits not in ("released", "divisor"):
            return None
        units = past_units(composition.task, composition.classes, self.unit)
        ratio = float(units * current / past)
        ranks = self.ranks()
        size = ranks.size if ranks else 1
        everywhere = Composition(size * current, size * past, composition.task)
        if ratio < 2 or feasible_splits(everywhere, self.splits, units) > 1:
            return None
        fits = "" if self.mixture == "batch" else "splits='exact', which fits any numbers of rows, or "
        return (
            f"splits={self.splits!r} finds no way to split {size * current} current rows beside {size * past} past "
            f"ones, though r is {ratio:.3g}, so this is plain batch normalisation; take {fits}numbers with a common "
            "divisor"
        )

    def reduce(self, rows: Rows) -> tuple[Plan | None, RowPlanner]:
        """A plan for rows that stand current first, if they do, and what makes one for any order.

        Raises:
            ValueError: a fixed number of splits that doesn't divide the current rows.
        """
        self.plan = None
        ranks = self.ranks() if self.synchronised else None
        key = "tbbn", self.splits, self.affine_gradient, self.unit, self.mixture, ranks and id(ranks.group)
        return rows.once(key, lambda: self._reduced(rows, ranks))

    def _reduced(self, rows: Rows, ranks: Ranks | None) -> tuple[Plan | None, RowPlanner]:
        past = rows.past
        if ranks:
            past = ranks.gather(past.to(torch.uint8)).flatten().bool()
        if isinstance(self.splits, int) and rows.task:
            count = int(past.sum())  # the one rule that has to wait for the device
            feasible_splits(Composition(len(past) - count, count, rows.task), self.splits)
        in_order = self._plan_of(rows.composition) if rows.composition and not ranks else None
        rule = RowRule(self.splits, past_units(rows.task, rows.classes, self.unit), self.mixture)
        return in_order, plan_rows(past, rule, self.affine_gradient == "balanced")

    def forget(self) -> None:
        """Knows nothing of any batch, as when it was new."""
        super().forget()
        self.plan = None

    def synchronise(self, process_group: Any = None) -> None:
        super().synchronise(process_group)
        self.forget()  # the number of splits is that of the rows of all ranks, so the composition must be set again

    def forward(self, x: Tensor) -> Tensor:
        check_images(x)
        plan = self._plan_for(x) if self.training else None
        if plan is None or (isinstance(plan, Plan) and plan.current == plan.rows):
            return self.batch_norm(x)
        if isinstance(plan, RowPlanner):
            y, mean, var = normalise_rows(x, self.weight, self.bias, self.eps, plan, self.ranks())
        else:
            y, mean, var = TaskBalancedFunction.apply(x, self.weight, self.bias, self.eps, plan, self.ranks())
        self.track(mean, var)
        return y

    def _plan_for(self, x: Tensor) -> Plan | RowPlanner:
        if self.plan is None:
            reduced = self.take(x).reduced
            # Compiled code for any order knows no numbers of rows, so it fits the next batch as well; and it must not
            # so much as look whether there is a plan for ordered rows.
            return reduced[1] if torch.compiler.is_compiling() or reduced[0] is None else reduced[0]
        if self.plan.rows != x.shape[0]:
            raise ValueError(
                f"the composition says {self.plan.rows} rows, the batch has {x.shape[0]}; set it for each batch"
            )
        return self.plan

    def extra_repr(self) -> str:
        own = f"splits={self.splits}, affine_gradient={self.affine_gradient}, unit={self.unit}"
        return f"{super().extra_repr()}, {own}"


def check() -> None:
    """Compares the layer with batch normalisation of one split after the other, after 1 to 9 learned tasks.

    Raises:
        AssertionError: they differ.
    """
    for task in range(1, 10):
        composition = Composition(48, 16, task)
        layer = TaskBalancedBatchNorm2d(5, dtype=torch.double)
        layer.compose(composition)
        _task_balanced_check.check(layer, feasible_splits(composition, "released"), composition)


@hookimpl
def cilnorm_norms() -> Sequence[Norm]:
    paper = "https://arxiv.org/abs/2201.12559"
    return [Norm("tbbn", TaskBalancedBatchNorm2d, paper, composition_aware=True, check=check)]
