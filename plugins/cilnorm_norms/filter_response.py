"""Filter response normalisation: every channel of every image by its root mean square, and a learned threshold.

    y = γ · x / √(mean x² + ε) + β over the area of one channel of one image;   z = max(y, τ), τ learned, a channel each

Singh and Krishnan, "Filter Response Normalization Layer: Eliminating Batch Dependence in the Training of Deep Neural
Networks", CVPR 2020, https://arxiv.org/abs/1911.09737. Nothing depends on the batch. The threshold (TLU) takes the
place of the activation, since y is not centred.

As in timm's layer ε is 1e-5 and fixed, so that an area of 1 x 1 gives about γ · sign(x) + β. Where a network applies an
activation of its own and doesn't say so, the layer is y alone: with a ReLU behind it, τ = 0 would get no gradient.
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


class FilterResponseNorm2d(SelfActivating):
    """Filter response normalisation of (N, C, H, W), https://arxiv.org/abs/1911.09737.

    Parameters: ``weight`` γ and ``bias`` β (C,), and, where it activates, ``tau`` τ (C,).

    Args:
        num_features: C.
        eps: added to the mean square.
        momentum, track_running_stats: ignored; there are no averages.
        affine: whether there are γ and β.
        device, dtype: of the parameters.
        act: whether the threshold is applied; None leaves it to the network, and means no where that doesn't say.
    """

    alone = False

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
        act: bool | None = None,
    ) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self._empty = partial(torch.empty, num_features, device=device, dtype=dtype)
        self.weight = nn.Parameter(self._empty()) if affine else None
        self.bias = nn.Parameter(self._empty()) if affine else None
        self.tau: nn.Parameter | None = None
        self.choose_activation(act)
        self.reset_parameters()

    def set_activation(self, act: bool) -> None:
        """With τ = 0, a ReLU to begin with, or without τ."""
        self.activates = act
        self.tau = nn.Parameter(torch.zeros_like(self._empty())) if act else None

    def reset_parameters(self) -> None:
        """γ 1, β and τ 0."""
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)
        if self.tau is not None:
            nn.init.zeros_(self.tau)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x)
        mean, var = _passes.moments(x, lanes=len(x))
        scale = torch.rsqrt(var + mean.square() + self.eps)  # the mean of squares, from what one pass gives anyway
        shift = torch.zeros_like(scale)
        if self.weight is not None and self.bias is not None:
            scale, shift = scale * self.weight, shift + self.bias
        if self.tau is None:
            return _passes.affine(x, torch.zeros_like(mean), scale, shift)
        wide = x.float() if x.dtype in HALF else x  # rounded before the threshold, values near it change sides
        y = _passes.affine(wide, torch.zeros_like(mean), scale, shift)
        return torch.maximum(y, self.tau.to(y.dtype).view(-1, 1, 1)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, affine={self.weight is not None}, act={self.activates}"


@hookimpl
def cilnorm_norms() -> Sequence[Norm]:
    return [Norm("frn", FilterResponseNorm2d, paper="https://arxiv.org/abs/1911.09737", aliases=("frntlu",))]
