"""Batch renormalisation: a batch's statistics, pulled to the running ones within limits that widen as training goes on.

    y = γ · (r · (x − μ) / σ + d) + β,   σ = √v + ε
    r = clip(σ / σ_run, 1 / r_max, r_max),   d = clip((μ − μ_run) / σ_run, −d_max, d_max),   both without gradient

Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models", 2017,
https://arxiv.org/abs/1702.03275. After n batches r_max = clip(2n / 35000 + 25 / 35, 1, 3) and d_max =
clip(5n / 20000 − 25 / 20, 0, 5), so that the first 5000 are plain batch normalisation.

As in the released code of the TBBN paper: ε is added to the deviation, not to the variance; the deviation is averaged,
not the variance; ε is 1e-3 and the weight of a new batch 0.01; n counts on from task to task. Different here: a plain
module, so that it can be copied and frozen; it loads the state of a ``BatchNorm2d``, taking √v + ε for σ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library, nn

from cilnorm.hookspecs import Norm, hookimpl
from cilnorm_norms import _passes
from cilnorm_norms._base import BatchDependent, check_images, recomputing


class BatchRenorm2d(BatchDependent):
    """Batch renormalisation of (N, C, H, W), https://arxiv.org/abs/1702.03275.

    Buffers: ``running_mean`` and ``running_std`` (C,), ``num_batches_tracked``, the n of the schedule.

    Args:
        num_features: C.
        eps (ε): added to the standard deviation.
        momentum: weight of a new batch in the running averages.
        affine: whether there are γ and β.
        track_running_stats: must be true.
        device, dtype: of parameters and buffers.

    Raises:
        ValueError: without running statistics.
    """

    running_mean: Tensor
    running_std: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-3,
        momentum: float = 0.01,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not track_running_stats:
            raise ValueError("batch renormalisation is made of running statistics; track_running_stats can't be False")
        self.num_features, self.eps, self.momentum = num_features, eps, momentum

        def empty() -> Tensor:
            return torch.empty(num_features, device=device, dtype=dtype)

        self.weight = nn.Parameter(empty()) if affine else None
        self.bias = nn.Parameter(empty()) if affine else None
        self.register_buffer("running_mean", empty())
        self.register_buffer("running_std", empty())
        self.register_buffer("num_batches_tracked", torch.zeros((), device=device, dtype=torch.long))
        self._before: tuple[Tensor, Tensor, Tensor] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """γ and the deviation 1, everything else 0."""
        for ones in (self.weight, self.running_std):
            if ones is not None:
                nn.init.ones_(ones)
        for zeros in (self.bias, self.running_mean, self.num_batches_tracked):
            if zeros is not None:
                nn.init.zeros_(zeros)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        variance = state_dict.pop(f"{prefix}running_var", None)
        if variance is not None:
            state_dict[f"{prefix}running_std"] = variance.sqrt() + self.eps
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x)
        if self.training:
            mean, scale, shift = self._of_batch(x)
        else:
            mean, scale = self.running_mean[None], self.running_std.reciprocal()[None]
            shift = torch.zeros_like(scale)
        if self.weight is not None and self.bias is not None:
            scale, shift = scale * self.weight, shift * self.weight + self.bias
        return _passes.affine(x, mean, scale, shift)

    def _of_batch(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """μ, r / σ and d (1, C), and the averages moved."""
        mean, var = _passes.moments(x)
        ranks = self.ranks()
        if ranks:
            mean, var = ranks.pool(mean, var)
        # A channel that is constant has a deviation of 0, where the root has no gradient.
        std = var.clamp_min(torch.finfo(var.dtype).tiny).sqrt() + self.eps
        running_mean, running_std, batches = self._averages()
        with torch.no_grad():
            r_max = (batches * (2 / 35000) + 25 / 35).clamp(1, 3)
            d_max = (batches * (5 / 20000) - 25 / 20).clamp(0, 5)
            r = (std / running_std).clamp(1 / r_max, r_max)
            d = ((mean - running_mean) / running_std).clamp(-d_max, d_max)
            if not recomputing():
                _move(self.running_mean, mean[0].detach(), self.momentum)
                _move(self.running_std, std[0].detach(), self.momentum)
                self.num_batches_tracked.add_(1)
        return mean, r / std, d

    def _averages(self) -> tuple[Tensor, Tensor, Tensor]:
        """The averages and n that this batch is to be compared to.

        A pass repeated by activation checkpointing must see what the first one saw, before it moved them; so the layer
        keeps them until the next batch. Two batches between one forward and its backward pass are one too many.
        """
        if recomputing() and self._before is not None:
            return self._before
        now = self.running_mean.clone(), self.running_std.clone(), self.num_batches_tracked.clone()
        if not torch.compiler.is_compiling():
            self._before = now
        return now

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.weight is not None}"


def _move(average: Tensor, value: Tensor, momentum: float) -> None:
    """Moves a running average. The compiler of torch 2.6 would do so once more going backward; it can't split an op."""
    move: Any = torch.ops.cilnorm.move if torch.compiler.is_compiling() else Tensor.lerp_
    move(average, value.to(average.dtype), momentum)


@library.custom_op(
    "cilnorm::move", mutates_args={"average"}, schema="(Tensor(a!) average, Tensor value, float momentum) -> ()"
)
def _move_as_op(average: Tensor, value: Tensor, momentum: float) -> None:
    average.lerp_(value, momentum)


@hookimpl
def cilnorm_norms() -> Sequence[Norm]:
    return [Norm("brn", BatchRenorm2d, paper="https://arxiv.org/abs/1702.03275", aliases=("batchrenorm",))]
