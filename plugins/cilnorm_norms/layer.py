"""Layer normalisation of images: every pixel is normalised by itself, over its channels.

    y = γ · (x − μ) / √(v + ε) + β,   μ and v over the C channels of one pixel

Ba, Kiros and Hinton, "Layer Normalization", 2016, https://arxiv.org/abs/1607.06450; over the channels of a pixel as in
Liu et al., "A ConvNet for the 2020s", 2022, https://arxiv.org/abs/2201.03545. Normalising over the area too is ``gn``
with ``groups=1``. One channel alone leaves nothing but β.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cilnorm.hookspecs import Norm, hookimpl
from cilnorm_norms._base import check_images
from cilnorm_norms._passes.plain import statistics_dtype


# Not called LayerNorm2d: timm takes classes of that name for its own and puts its own in their place.
class PixelLayerNorm2d(nn.LayerNorm):
    """Layer normalisation of (N, C, H, W) over C, https://arxiv.org/abs/1607.06450.

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
        super().__init__(num_features, eps, elementwise_affine=affine, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x)
        dtype = statistics_dtype(x)
        weight, bias = (None if value is None else value.to(dtype) for value in (self.weight, self.bias))
        with torch.autocast(x.device.type, enabled=False):
            y = F.layer_norm(x.movedim(1, -1).to(dtype), self.normalized_shape, weight, bias, self.eps)
        # layer_norm leaves the channels innermost, whatever the input's layout.
        y = y.movedim(-1, 1).to(x.dtype)
        return y.contiguous() if x.is_contiguous() else y


@hookimpl
def cilnorm_norms() -> Sequence[Norm]:
    return [Norm("ln2d", PixelLayerNorm2d, paper="https://arxiv.org/abs/1607.06450", aliases=("layernorm2d",))]
