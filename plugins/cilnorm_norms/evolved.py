"""EvoNorm-S0, found by search: norm and activation in one, by the variance of groups of channels of each image.

    y = γ · x · σ(v · x) / √(var + ε) + β,   var over the area of C / G channels of one image; x itself is not centred

Liu, Brock, Simonyan and Le, "Evolving Normalization-Activation Layers", NeurIPS 2020, https://arxiv.org/abs/2004.02967.
Nothing depends on the batch. Without its activation it is γ · x + β, which normalises nothing: as in timm's layer, the
last norm of a residual branch is that alone.

Departure: 8 groups by default, where the paper has 32, which cut few small networks' channels. Where a network applies
an activation of its own and doesn't say so, the layer still has its own, for else it would not normalise at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from cilnorm.hookspecs import Norm, hookimpl
from cilnorm.network import SelfActivating
from cilnorm_norms import _passes
from cilnorm_norms._base import check_images
from cilnorm_norms._passes.blocks import HALF
from cilnorm_norms.group import check_groups


class EvoNormS02d(SelfActivating):
    """EvoNorm-S0 of (N, C, H, W), https://arxiv.org/abs/2004.02967.

    Parameters: ``weight`` γ and ``bias`` β (C,), and, where it activates, ``v`` (C,).

    Args:
        num_features: C.
        eps: added to the variance.
        momentum, track_running_stats: ignored; there are no averages.
        affine: whether there are γ and β.
        device, dtype: of the parameters.
        groups: G.
        act: whether it activates, and normalises; None leaves it to the network, and means yes where that doesn't say.

    Raises:
        ValueError: groups that don't divide the channels.
    """

    alone = True

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
        act: bool | None = None,
    ) -> None:
        super().__init__()
        self.num_features, self.eps, self.groups = num_features, eps, check_groups(groups, num_features)
        self._empty = partial(torch.empty, num_features, device=device, dtype=dtype)
        self.weight = nn.Parameter(self._empty()) if affine else None
        self.bias = nn.Parameter(self._empty()) if affine else None
        self.v: nn.Parameter | None = None
        self.choose_activation(act)
        self.reset_parameters()

    def set_activation(self, act: bool) -> None:
        """With v = 1, or without v."""
        self.activates = act
        self.v = nn.Parameter(torch.ones_like(self._empty())) if act else None

    def reset_parameters(self) -> None:
        """γ and v 1, β 0."""
        for ones in (self.weight, self.v):
            if ones is not None:
                nn.init.ones_(ones)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x)
        z, scale = x, None
        if self.v is not None:
            scale = torch.rsqrt(self._variance(x) + self.eps)
            wide = x.float() if x.dtype in HALF else x  # two products and a sigmoid, rounded once
            z = wide * torch.sigmoid(wide * self.v.to(wide.dtype).view(-1, 1, 1))
        if self.weight is not None and self.bias is not None:
            scale = self.weight[None] if scale is None else scale * self.weight
        if scale is None:
            return z
        shift = torch.zeros_like(scale) if self.bias is None else torch.zeros_like(scale) + self.bias
        return _passes.affine(z, torch.zeros_like(scale), scale, shift).to(x.dtype)

    def _variance(self, x: Tensor) -> Tensor:
        """Biased variance of each channel's group, (N, C)."""
        mean, var = (value.unflatten(1, (self.groups, -1)) for value in _passes.moments(x, lanes=len(x)))
        apart = mean - mean.mean(2, keepdim=True)
        return (var + apart.square()).mean(2, keepdim=True).expand_as(var).flatten(1)

    def extra_repr(self) -> str:
        affine = self.weight is not None
        return f"{self.num_features}, eps={self.eps}, affine={affine}, groups={self.groups}, act={self.activates}"


@hookimpl
def cilnorm_norms() -> Sequence[Norm]:
    return [Norm("evonorm-s0", EvoNormS02d, paper="https://arxiv.org/abs/2004.02967", aliases=("evonorm",))]
