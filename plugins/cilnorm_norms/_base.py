"""What batch-dependent layers share: plain batch normalisation, its averages, ranks, and being run twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from cilnorm.rows_aware import recomputing
from cilnorm.running import KeepsStatistics
from cilnorm_norms import _passes


def check_images(x: Tensor) -> None:
    """Raises ValueError for anything but (N, C, H, W)."""
    if x.dim() != 4:
        raise ValueError(f"expected an input (N, C, H, W), got one of {x.dim()} dimensions")


@dataclass(frozen=True)
class Ranks:
    """The processes whose rows make up one batch; each holds the same number of rows."""

    group: Any
    index: int
    size: int

    def gather(self, value: Tensor) -> Tensor:
        """The values of all ranks, (ranks, ...); carries no gradient."""
        out = [torch.empty_like(value) for _ in range(self.size)]
        distributed.all_gather(out, value.contiguous(), group=self.group)
        return torch.stack(out)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks; its gradient is the sum of the ranks' gradients."""
        return _SumOverRanks.apply(value, self.group)

    def pool(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance over all ranks of what each has as many values of; a message each way."""
        pooled: tuple[Tensor, Tensor] = _Pooled.apply(mean, var, self)
        return pooled


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        ctx.group = group
        value = value.contiguous().clone()
        distributed.all_reduce(value, group=group)
        return value

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _SumOverRanks.apply(g, ctx.group), None


class _Pooled(torch.autograd.Function):
    """M = mean_r m_r, V = mean_r [v_r + (m_r − M)²] (Chan's formula), so ∂V/∂m_r = 2 (m_r − M) / R."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, var: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
        means, variances = ranks.gather(torch.stack([mean, var])).unbind(1)
        everywhere = means.mean(0)
        apart = means - everywhere
        ctx.ranks = ranks
        ctx.save_for_backward(apart[ranks.index])
        return everywhere, (variances + apart.square()).mean(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_mean: Tensor, of_var: Tensor) -> tuple[Tensor, Tensor, None]:
        (apart,) = ctx.saved_tensors
        of_mean, of_var = (ctx.ranks.sum(torch.stack([of_mean, of_var])) / ctx.ranks.size).unbind()
        return torch.addcmul(of_mean, of_var, apart, value=2), of_var, None


class BatchDependent(KeepsStatistics):
    """A layer whose output depends on the whole batch, wherever its rows lie."""

    synchronised: bool = False
    process_group: Any = None

    def synchronise(self, process_group: Any = None) -> None:
        """From now on, in training, the batch is what all processes of the group hold together (None: all there are).

        Every process must hold the same number of rows, and know the composition of its own.
        """
        self.synchronised, self.process_group = True, process_group

    def ranks(self) -> Ranks | None:
        """The processes to share statistics with; None where this one is alone."""
        if not (self.synchronised and distributed.is_available() and distributed.is_initialized()):
            return None
        group = self.process_group
        size = distributed.get_world_size(group)
        return Ranks(group, distributed.get_rank(group), size) if size > 1 else None


class BatchNormBase(BatchDependent, _NormBase):
    """Batch normalisation of (N, C, H, W) with the parameters, buffers and state of ``BatchNorm2d``.

    It is no ``BatchNorm2d`` itself, because ``convert_sync_batchnorm`` and its like replace every one that they meet by
    a layer that lacks whatever a subclass adds.

    Args:
        num_features: C.
        eps (ε): added to the variance.
        momentum: weight of a new batch in the running averages; null (None) for the mean of all batches.
        affine: whether there are a learned scale γ and shift β of each channel.
        track_running_stats: whether running averages are kept for evaluation.
        device, dtype: of parameters and buffers.
    """

    counts: bool = True  # batches, in num_batches_tracked; a cumulative average (momentum None) always does

    def forward(self, x: Tensor) -> Tensor:
        return self.batch_norm(x)

    def gamma_and_beta(self) -> tuple[Tensor | None, Tensor | None]:
        """What normalised values are multiplied by and moved by, (C,) each; the parameters as they are."""
        return self.weight, self.bias

    def batch_norm(self, x: Tensor) -> Tensor:
        """What ``BatchNorm2d`` does, over all ranks if synchronised, its averages left alone in a repeated pass."""
        check_images(x)
        weight, bias = self.gamma_and_beta()
        mean, var, ranks = self.running_mean, self.running_var, self.ranks()
        if not self.training:
            return F.batch_norm(x, mean, var, weight, bias, mean is None, 0.0, self.eps)
        if ranks:
            return self._across(ranks, x, weight, bias)
        if mean is None or var is None:
            return F.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)
        if recomputing():
            # On copies rather than without averages, for checkpointing wants as many tensors saved as the first time.
            return F.batch_norm(x, mean.clone(), var.clone(), weight, bias, True, 0.0, self.eps)
        if self.momentum is None:
            # A momentum of 1 leaves the batch's own mean and unbiased variance behind.
            mean, var = torch.zeros_like(mean), torch.ones_like(mean)
            y = F.batch_norm(x, mean, var, weight, bias, True, 1.0, self.eps)
            self.track(mean, var)
            return y
        if self.num_batches_tracked is not None and self.counts:
            self.num_batches_tracked.add_(1)
        if not torch.compiler.is_compiling():
            # Autograd keeps the averages that it is given, though training never reads them going backward, and refuses
            # to go on where ``track`` moved them since. Views by ``data`` have a version counter of their own.
            mean, var = mean.data, var.data
        return F.batch_norm(x, mean, var, weight, bias, True, self.momentum, self.eps)

    def _across(self, ranks: Ranks, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        mean, var = ranks.pool(*_passes.moments(x))
        count = x.numel() // self.num_features * ranks.size
        scale = torch.rsqrt(var + self.eps)
        if weight is not None:
            scale = scale * weight
        shift = torch.zeros_like(scale) if bias is None else bias.to(scale.dtype)[None]
        self.track(mean[0], var[0] * (count / (count - 1)))
        return _passes.affine(x, mean, scale, shift)

    @torch.no_grad()
    def track(self, mean: Tensor, var: Tensor) -> None:
        """Moves the averages towards a batch's mean and unbiased variance (C,), unless this pass repeats another."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None or recomputing():
            return
        if self.counts or self.momentum is None:
            self.num_batches_tracked.add_(1)
        dtype = self.running_mean.dtype
        momentum = self.num_batches_tracked.to(dtype).reciprocal() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(dtype), momentum)
        self.running_var.lerp_(var.to(dtype), momentum)
