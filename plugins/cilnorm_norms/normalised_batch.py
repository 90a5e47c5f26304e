"""Batch normalisation whose γ and β are unit vectors with one learned length, so that no channel outgrows the others.

    y = γ̂ · (x − μ) / √(v + ε) + β̂,   γ̂ = α · γ / (‖γ‖ + floor),   β̂ = α · β / (‖β‖ + floor)

Bao et al., "Normalizing Batch Normalization for Long-Tailed Recognition", IEEE TIP,
https://arxiv.org/abs/2501.03122. Statistics, averages and evaluation are those of batch normalisation.

As in the released code both vectors share α, which starts at 1, and ``floor`` is 1e-6. Departures: α belongs to a layer
(there to a network, ``scale_factor[0]``), and whatever layers one asks for are of this kind (there the last of each
block and shortcut of the last stage). To know before training: at γ = 1 the layer multiplies by α / √C, not by 1
(``alpha: null`` starts α at √C); and while β is 0 its gradient is α / floor times the usual, so that the first step
throws β far away, where its direction hardly moves any more, and a bound on the norm of the gradient leaves nothing of
the others. ``floor`` of 1e-2, say, takes that away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cilnorm.hookspecs import Norm, hookimpl
from cilnorm_norms._base import BatchNormBase


class NormalisedBatchNorm2d(BatchNormBase):
    """Batch normalisation of (N, C, H, W) with γ and β of length α, https://arxiv.org/abs/2501.03122.

    State of ``BatchNorm2d``, and ``scale_factor`` (1,), which is α.

    Args:
        num_features: C.
        eps, momentum, affine, track_running_stats, device, dtype: as for ``BatchNorm2d``; without γ and β no α either.
        alpha: where α starts; None for √C, at which a fresh layer is batch normalisation.
        floor: added to both lengths.

    Raises:
        ValueError: a floor that is not above 0.
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
        alpha: float | None = 1.0,
        floor: float = 1e-6,
    ) -> None:
        if floor <= 0:
            raise ValueError(f"floor must be above 0, not {floor}")
        self.alpha, self.floor = alpha, floor
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.scale_factor = nn.Parameter(torch.empty(1, device=device, dtype=dtype)) if affine else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """γ 1, β 0, α where it starts."""
        super().reset_parameters()
        scale = getattr(self, "scale_factor", None)  # the parent's constructor comes here before there is one
        if scale is not None:
            nn.init.constant_(scale, math.sqrt(self.num_features) if self.alpha is None else self.alpha)

    def gamma_and_beta(self) -> tuple[Tensor | None, Tensor | None]:
        """γ̂ and β̂."""
        return self._of_length_alpha(self.weight), self._of_length_alpha(self.bias)

    def _of_length_alpha(self, vector: Tensor | None) -> Tensor | None:
        if vector is None or self.scale_factor is None:
            return None
        return vector * (self.scale_factor / (torch.linalg.vector_norm(vector) + self.floor))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha={self.alpha}, floor={self.floor}"


@hookimpl
def cilnorm_norms() -> Sequence[Norm]:
    return [Norm("nbn", NormalisedBatchNorm2d, paper="https://arxiv.org/abs/2501.03122")]
