"""Continual normalisation: group normalisation without affine map, then batch normalisation.

    y = BN(GN(x)),   GN(x) = (x − μ) / √(v + ε) over the area of C / G channels of one image

Pham, Liu and Hoi, "Continual Normalization: Rethinking Batch Normalization for Online Continual Learning", 2022,
https://arxiv.org/abs/2203.16102. Running averages are those of the group-normalised signal; ε is the same in both.
8 groups is what the TBBN paper's scripts run; the authors of CN use 32. As in the released code,
``num_batches_tracked`` stands still.

``cn*`` is CN with a number of groups chosen on validation data among those that divide the channels; the TBBN paper
names it without a definition, and its slides say only that CN's hyperparameter needs tuning. ``tbbn+cn`` puts
task-balanced batch normalisation second; it comes from no paper.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cilnorm.hookspecs import Norm, hookimpl
from cilnorm_norms._base import BatchNormBase
from cilnorm_norms.group import check_groups, group_norm
from cilnorm_norms.task_balanced import AffineGradient, SplitRule, TaskBalancedBatchNorm2d, Unit

PAPER = "https://arxiv.org/abs/2203.16102"


class _AfterGroups(BatchNormBase):
    """Group normalisation in front of what the next class of the hierarchy does."""

    groups: int

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(group_norm(x, self.groups, self.eps)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}"


class ContinualNorm2d(_AfterGroups):
    """Continual normalisation of (N, C, H, W), https://arxiv.org/abs/2203.16102; state of ``BatchNorm2d``.

    Args:
        num_features: C.
        eps (ε): added to the variance, in both steps.
        groups (G): into which the channels of an image are cut for the first step.

    Raises:
        ValueError: groups that don't divide the channels.
    """

    counts = False

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
        groups: int = 8,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.groups = check_groups(groups, num_features)


class TaskBalancedContinualNorm2d(_AfterGroups, TaskBalancedBatchNorm2d):
    """Group normalisation, then task-balanced batch normalisation; state of ``BatchNorm2d``.

    Args:
        num_features: C.
        eps (ε): added to the variance, in both steps.
        groups (G): into which the channels of an image are cut for the first step.

    Raises:
        ValueError: groups that don't divide the channels, and whatever the second step refuses.
    """

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
        groups: int = 8,
        splits: SplitRule | int = "released",
        affine_gradient: AffineGradient = "released",
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
            affine_gradient=affine_gradient,
            unit=unit,
        )
        self.groups = check_groups(groups, num_features)


@hookimpl
def cilnorm_norms() -> Sequence[Norm]:
    return [
        Norm("cn", ContinualNorm2d, paper=PAPER, aliases=("continualnorm",)),
        Norm("cn*", ContinualNorm2d, paper=PAPER, tune={"groups": (4, 8, 16, 32)}),
        Norm("tbbn+cn", TaskBalancedContinualNorm2d, paper="https://arxiv.org/abs/2201.12559", composition_aware=True),
    ]
