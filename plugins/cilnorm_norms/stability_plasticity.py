"""Half of the channels by batch statistics, for plasticity; the others image by image, for stability.

The first c = ⌊ratio · C⌋ channels are batch-normalised. For the others, with instance mean μ_in and variance v_in over
the area of one channel of one image, and over all of these channels

    μ_ln = mean_c μ_in,   v_ln = mean_c (v_in + μ_in²) − μ_ln²
    μ = p · (μ_in, μ_ln),   v = q · (v_in, v_ln),   p and q softmaxes of two learned logits each
    y = γ · (x − μ) / √(v + ε) + β

Jung et al., "New Insights for the Stability-Plasticity Dilemma in Online Continual Learning", ICLR 2023,
https://arxiv.org/abs/2302.08741. It has no batch part in the mixture, unlike ``sn``.

As in the released code v_in is unbiased. Departures: an area of 1 x 1 has instance variance 0 (the unbiased one is
0 / 0), any C and ratio will do (there an odd C fails), and one γ and one β cover all channels, so that the layer loads
the state of a ``BatchNorm2d``, from whose averages it takes those of its first c channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cilnorm.hookspecs import Norm, hookimpl
from cilnorm_norms import _passes
from cilnorm_norms._base import BatchNormBase, check_images

Variance = Literal["unbiased", "biased"]


class SPNorm2d(BatchNormBase):
    """Batch normalisation beside a mixture of instance and layer normalisation, https://arxiv.org/abs/2302.08741.

    Parameters: ``weight`` γ and ``bias`` β (C,), ``mean_weight`` and ``var_weight`` (2,), logits of p and q in the
    order instance, layer. Buffers: ``running_mean`` and ``running_var`` (c,), ``num_batches_tracked``.

    Args:
        num_features: C.
        eps, momentum, affine, track_running_stats, device, dtype: as for ``BatchNorm2d``.
        ratio: part of the channels that is batch-normalised.
        variance: of instances, ``unbiased`` or ``biased``.

    Raises:
        ValueError: a ratio outside [0, 1], or a variance of another name.
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
        ratio: float = 0.5,
        variance: Variance = "unbiased",
    ) -> None:
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratio is a part of the channels in [0, 1], not {ratio}")
        if variance not in ("unbiased", "biased"):
            raise ValueError(f"no variance called {variance!r}; there are unbiased, biased")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.ratio, self.variance = ratio, variance
        self.bn_channels = int(num_features * ratio)
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean = self.running_mean[: self.bn_channels].clone()
            self.running_var = self.running_var[: self.bn_channels].clone()
        self.mean_weight = nn.Parameter(torch.ones(2, device=device, dtype=dtype))
        self.var_weight = nn.Parameter(torch.ones(2, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """γ and the logits 1, β 0."""
        super().reset_parameters()
        for logits in (getattr(self, "mean_weight", None), getattr(self, "var_weight", None)):
            if logits is not None:
                nn.init.ones_(logits)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in (f"{prefix}running_mean", f"{prefix}running_var"):
            if name in state_dict and state_dict[name].shape == (self.num_features,):
                state_dict[name] = state_dict[name][: self.bn_channels]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x)
        mean, var = _passes.moments(x, lanes=len(x))  # (N, C)
        cut = [self.bn_channels, self.num_features - self.bn_channels]
        (mean_a, mean_b), (var_a, var_b) = mean.split(cut, 1), var.split(cut, 1)
        area = x.shape[2] * x.shape[3]
        mean_bn, var_bn = self._batch_pair(mean_a, var_a, area)
        mean_mix, var_mix = self._mixture(mean_b, var_b, area)
        scale = torch.rsqrt(torch.cat([var_bn.expand_as(var_a), var_mix], 1) + self.eps)
        shift = torch.zeros_like(scale)
        if self.weight is not None and self.bias is not None:
            scale, shift = scale * self.weight, shift + self.bias
        return _passes.affine(x, torch.cat([mean_bn.expand_as(mean_a), mean_mix], 1), scale, shift)

    def _batch_pair(self, mean_in: Tensor, var_in: Tensor, area: int) -> tuple[Tensor, Tensor]:
        """Batch mean and biased variance (1, c) from the instances' (N, c), or the running averages."""
        if not self.training and self.running_mean is not None and self.running_var is not None:
            dtype = mean_in.dtype
            return self.running_mean[None].to(dtype), self.running_var[None].to(dtype)
        mean = mean_in.mean(0, keepdim=True)
        var = (var_in + (mean_in - mean).square()).mean(0, keepdim=True)
        count, ranks = len(mean_in) * area, self.ranks() if self.training else None
        if ranks:
            mean, var = ranks.pool(mean, var)
            count *= ranks.size
        if self.training:
            self.track(mean[0].detach(), var[0].detach() * (count / max(count - 1, 1)))
        return mean, var

    def _mixture(self, mean_in: Tensor, var_in: Tensor, area: int) -> tuple[Tensor, Tensor]:
        """The mixed pair (N, C − c) from the instances' means and biased variances."""
        if self.variance == "unbiased":
            var_in = var_in * (area / max(area - 1, 1))
        mean_ln = mean_in.mean(1, keepdim=True)
        # v + mean of squares − square of mean, written so that it can't cancel.
        var_ln = (var_in + (mean_in - mean_ln).square()).mean(1, keepdim=True)
        p, q = self.mean_weight.softmax(0), self.var_weight.softmax(0)
        return p[0] * mean_in + p[1] * mean_ln, q[0] * var_in + q[1] * var_ln

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ratio={self.ratio}, variance={self.variance}"


@hookimpl
def cilnorm_norms() -> Sequence[Norm]:
    return [Norm("spnorm", SPNorm2d, paper="https://arxiv.org/abs/2302.08741")]
