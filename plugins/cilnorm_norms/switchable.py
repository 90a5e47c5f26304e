"""Switchable normalisation: learns how much of instance, layer and batch statistics to use.

    y = γ · (x − Σ_k p_k μ_k) / √(Σ_k q_k v_k + ε) + β,   k in instance, layer, batch;   p, q softmaxes of 3 logits each

with v_in the unbiased variance of one channel of one image, and, built on it,

    μ_ln = mean_c μ_in,   v_ln = mean_c (v_in + μ_in²) − μ_ln²
    μ_bn = mean_n μ_in,   v_bn = mean_n (v_in + μ_in²) − μ_bn²

Luo, Ren, Peng, Zhang and Li, "Differentiable Learning-to-Normalize via Switchable Normalization", 2018,
https://arxiv.org/abs/1806.10779. In evaluation running averages stand for the batch pair.

This is the class in the released code of the TBBN paper, whose command line builds it and then trains plain BN. As
there, both running averages start at 0. Different here: an area of 1 x 1 has instance variance 0 (the unbiased one is
0 / 0), and ``momentum`` is the weight of the new value, as in torch, so 0.003 where the released code says 0.997.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cilnorm.hookspecs import Norm, hookimpl
from cilnorm_norms import _passes
from cilnorm_norms._base import BatchDependent, check_images, recomputing


class SwitchNorm2d(BatchDependent):
    """Switchable normalisation of (N, C, H, W), https://arxiv.org/abs/1806.10779.

    Parameters: ``weight`` γ and ``bias`` β (C,), ``mean_weight`` and ``var_weight`` (3,), logits of p and q.

    Args:
        num_features: C.
        eps (ε): added to the variance.
        momentum: weight of the new value in the running averages.
        affine: whether there are γ and β.
        track_running_stats: without, evaluation uses the batch's own statistics.
        device, dtype: of parameters and buffers.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    bessel = False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.003,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features, self.eps, self.momentum = num_features, eps, momentum

        def empty(size: int) -> Tensor:
            return torch.empty(size, device=device, dtype=dtype)

        self.weight = nn.Parameter(empty(num_features)) if affine else None
        self.bias = nn.Parameter(empty(num_features)) if affine else None
        self.mean_weight, self.var_weight = nn.Parameter(empty(3)), nn.Parameter(empty(3))
        self.register_buffer("running_mean", empty(num_features) if track_running_stats else None)
        self.register_buffer("running_var", empty(num_features) if track_running_stats else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """γ and the logits 1, everything else 0."""
        for ones in (self.weight, self.mean_weight, self.var_weight):
            if ones is not None:
                nn.init.ones_(ones)
        for zeros in (self.bias, self.running_mean, self.running_var):
            if zeros is not None:
                nn.init.zeros_(zeros)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x)
        mean_in, var_in = _passes.moments(x, lanes=len(x))
        area = x.shape[2] * x.shape[3]
        var_in = var_in * (area / max(area - 1, 1))
        mean_ln = mean_in.mean(1, keepdim=True)
        # v + mean of squares − square of mean, written so that it can't cancel.
        var_ln = var_in.mean(1, keepdim=True) + (mean_in - mean_ln).square().mean(1, keepdim=True)
        mean_bn, var_bn = self._batch_pair(mean_in, var_in)
        p, q = self.mean_weight.softmax(0), self.var_weight.softmax(0)
        mean = p[0] * mean_in + p[1] * mean_ln + p[2] * mean_bn
        scale = torch.rsqrt(q[0] * var_in + q[1] * var_ln + q[2] * var_bn + self.eps)
        shift = torch.zeros_like(scale)
        if self.weight is not None and self.bias is not None:
            scale, shift = scale * self.weight, self.bias + shift
        return _passes.affine(x, mean, scale, shift)

    def _batch_pair(self, mean_in: Tensor, var_in: Tensor) -> tuple[Tensor, Tensor]:
        """Batch mean and variance (C,) from the instances' (N, C), or their running averages."""
        if not self.training and self.running_mean is not None and self.running_var is not None:
            return self.running_mean, self.running_var
        mean = mean_in.mean(0)
        var = var_in.mean(0) + (mean_in - mean).square().mean(0)
        ranks = self.ranks() if self.training else None
        if ranks:
            mean, var = ranks.pool(mean, var)
        if self.training and self.running_mean is not None and self.running_var is not None and not recomputing():
            with torch.no_grad():
                self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_(var.detach().to(self.running_var.dtype), self.momentum)
        return mean, var

    def extra_repr(self) -> str:
        tracking = self.running_mean is not None
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.weight is not None}, "
            f"track_running_stats={tracking}"
        )


@hookimpl
def cilnorm_norms() -> Sequence[Norm]:
    return [Norm("sn", SwitchNorm2d, paper="https://arxiv.org/abs/1806.10779", aliases=("switchnorm",))]
