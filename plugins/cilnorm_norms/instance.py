"""Instance normalisation: every channel of every image is normalised by itself.

    y = γ · (x − μ) / √(v + ε) + β,   μ and v over the area of one channel of one image

Ulyanov, Vedaldi and Lempitsky, "Instance Normalization: The Missing Ingredient for Fast Stylization", 2016,
https://arxiv.org/abs/1607.08022. Group normalisation with as many groups as channels.

Different: γ and β are learned by default, as with the other layers here; torch's layer and the released code of the
TBBN paper have none (``affine=False``). There are no running averages. An area of 1 x 1 gives β; torch refuses it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cilnorm.hookspecs import Norm, hookimpl
from cilnorm_norms.group import GroupNorm2d


class InstanceNorm2d(GroupNorm2d):
    """Instance normalisation of (N, C, H, W), https://arxiv.org/abs/1607.08022.

    Args:
        num_features: C.
        eps (ε): added to the variance.
        momentum, track_running_stats: ignored; there are no averages.
        affine: whether there are γ and β (C,).
        device, dtype: of γ and β.
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
    ) -> None:
        super().__init__(num_features, eps, affine=affine, device=device, dtype=dtype, groups=num_features)


@hookimpl
def cilnorm_norms() -> Sequence[Norm]:
    return [Norm("in", InstanceNorm2d, paper="https://arxiv.org/abs/1607.08022", aliases=("instancenorm",))]
