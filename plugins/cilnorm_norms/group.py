"""Group normalisation: every image is normalised by itself, over groups of channels.

    y = γ · (x − μ) / √(v + ε) + β,   μ and v over the area of C / G channels of one image

Wu and He, "Group Normalization", 2018, https://arxiv.org/abs/1803.08494. Nothing depends on the batch, so training and
evaluation are the same and there are no averages.

Different: the default of 8 groups is that of continual normalisation, since the paper's 32 divide few small networks'
channels. The released code of the TBBN paper counts channels per group, 16, and has no γ and β: ask for
``channels_per_group=16, affine=False``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cilnorm.hookspecs import Norm, hookimpl
from cilnorm_norms._base import check_images
from cilnorm_norms._passes.plain import statistics_dtype


def group_norm(x: Tensor, groups: int, eps: float, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Group normalisation of (N, C, H, W), computed and returned in the precision of statistics.

    torch's kernel without the check in front of it, which takes one image of 1 x 1 for a batch to train on.
    """
    check_images(x)
    dtype = statistics_dtype(x)
    weight, bias = (None if value is None else value.to(dtype) for value in (weight, bias))
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(dtype)
        if weight is not None and not (x.requires_grad or torch.compiler.is_compiling()):
            x = x.detach().requires_grad_(weight.requires_grad)  # or torch 2.6 crashes going backward in channels_last
        return torch.group_norm(x, groups, weight, bias, eps)


def check_groups(groups: int, channels: int) -> int:
    """``groups``, if that many cut ``channels`` evenly.

    Raises:
        ValueError: naming both, if not.
    """
    if groups < 1 or channels % groups:
        raise ValueError(f"{channels} channels can't be cut into {groups} groups")
    return groups


class GroupNorm2d(nn.GroupNorm):
    """Group normalisation of (N, C, H, W), https://arxiv.org/abs/1803.08494.

    Args:
        num_features: C.
        eps (ε): added to the variance.
        momentum, track_running_stats: ignored; there are no averages.
        affine: whether there are γ and β (C,).
        device, dtype: of γ and β.
        groups (G): into which the channels of an image are cut.
        channels_per_group: C / G, channels of a group; takes the place of ``groups``. More than C means one group.

    Raises:
        ValueError: groups that don't divide the channels.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = None,
        affine: bool = True,
        track_running_stats: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        groups: int = 8,
        channels_per_group: int | None = None,
    ) -> None:
        if channels_per_group is not None:
            if num_features % min(channels_per_group, num_features):
                raise ValueError(f"{num_features} channels can't be cut into groups of {channels_per_group}")
            groups = max(num_features // channels_per_group, 1)
        super().__init__(check_groups(groups, num_features), num_features, eps, affine, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self.num_groups, self.eps, self.weight, self.bias).to(x.dtype)


@hookimpl
def cilnorm_norms() -> Sequence[Norm]:
    return [Norm("gn", GroupNorm2d, paper="https://arxiv.org/abs/1803.08494", aliases=("groupnorm",))]
