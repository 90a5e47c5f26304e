"""Batch normalisation with the splits of TBBN: current rows in r groups, each seeing the mixture of the whole batch.

A batch of B_c current and B_p past rows after t learned tasks is looked at as r splits, as in TBBN: each of every r-th
current row and all past rows. But a current row weighs r times as much as a past one in the moments of its split, so
that they are of the mixture B_c : B_p that batch normalisation sees:

    μ_s = (Σ_past x + r Σ_{current of s} x) / (B_c + B_p) over the rows, v_s likewise around μ_s, a_s = γ / √(v_s + ε)

    current row j:  y = a_s (x − μ_s) + β,  s = j mod r            past row:  y = mean_s [a_s (x − μ_s)] + β

and the running averages follow mean_s μ_s, which is the batch's mean, and mean_s v_s n / (n − 1), n being the values
of the whole batch. Evaluation is batch normalisation.

No paper has it: it is what stays of TBBN (Cha et al., CVPR 2023, https://arxiv.org/abs/2201.12559) without its balance.
The more splits, the fewer current rows decide how a current row is normalised, and the harder a new task is to learn;
docs/results.md has what comes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, get_args

import torch

from cilnorm.hookspecs import Norm, hookimpl
from cilnorm_norms.task_balanced import Mixture, TaskBalancedBatchNorm2d, Unit

Divisors = Literal["released", "divisor"]


class SplitBatchNorm2d(TaskBalancedBatchNorm2d):
    """Batch normalisation of (N, C, H, W) with the splits of TBBN and without its balance; state of ``BatchNorm2d``.

    For training it must know what the batch is made of, as TBBN must.

    Args:
        num_features: C.
        splits (r): ``released``: the largest common divisor of the current and the past rows not above t · B_c / B_p;
            ``divisor``: the largest divisor of the current rows not above it. A number: that many splits.
        unit (t): what is counted: ``tasks`` learned before, however many classes they have, or ``classes``: the number
            of old ones by that of new ones. The same where all tasks are of one size.

    Raises:
        ValueError: another option than these, an input that isn't (N, C, H, W), a batch of another size than the
            composition's.
        RuntimeError: training without a composition.
    """

    mixture: ClassVar[Mixture] = "batch"
    split_rules: ClassVar[tuple[str, ...]] = get_args(Divisors)

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
        splits: Divisors | int = "released",
        unit: Unit = "tasks",
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device=device,
            dtype=dtype,
            splits=splits,
            unit=unit,
        )


@hookimpl
def cilnorm_norms() -> Sequence[Norm]:
    return [Norm("bn+splits", SplitBatchNorm2d, composition_aware=True)]
