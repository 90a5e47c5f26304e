"""Root mean square norm over the channels of each place: no statistics of a batch, so no task leans on another.

    y = γ · x / √(mean_c x² + ε) + β

Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, https://arxiv.org/abs/1910.07467; β is ours, for the
convolutions before a norm have no bias.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from cilnorm.hookspecs import Norm, SettingsFile, hookimpl

api_version = 1


class RMSNorm2d(nn.Module):
    """Maps (N, C, H, W) to the same; ``momentum`` and ``track_running_stats`` are taken for interchangeability."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        ones = torch.ones(num_features, device=device, dtype=dtype)
        self.weight = nn.Parameter(ones) if affine else None
        self.bias = nn.Parameter(torch.zeros_like(ones)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        y = x * (x.square().mean(1, keepdim=True) + self.eps).rsqrt()
        if self.weight is None or self.bias is None:
            return y
        return y * self.weight[:, None, None] + self.bias[:, None, None]

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, affine={self.weight is not None}"


@hookimpl
def cilnorm_norms() -> list[Norm]:
    return [Norm("rms", RMSNorm2d, paper="https://arxiv.org/abs/1910.07467")]


@hookimpl
def cilnorm_settings() -> list[SettingsFile]:
    return [SettingsFile(Path(__file__).with_name("settings.yaml"))]
