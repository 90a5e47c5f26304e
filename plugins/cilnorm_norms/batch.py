"""Batch normalisation, the layer that every other one here is compared to.

    y = γ · (x − μ) / √(v + ε) + β,   μ and v over the rows and the area of a batch; running averages in evaluation

Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift", 2015,
https://arxiv.org/abs/1502.03167. This is torch's layer; what it does besides is to leave its averages alone when
activation checkpointing repeats a pass, and to share statistics among processes on any device, the CPU included.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from cilnorm.hookspecs import Norm, hookimpl
from cilnorm_norms._base import BatchNormBase


class BatchNorm2d(BatchNormBase, nn.BatchNorm2d):
    """Batch normalisation of (N, C, H, W), https://arxiv.org/abs/1502.03167; arguments and state of torch's layer.

    Args:
        bias: whether there is β, where torch's layer can do without.
    """


@hookimpl
def cilnorm_norms() -> Sequence[Norm]:
    return [Norm("bn", BatchNorm2d, paper="https://arxiv.org/abs/1502.03167", aliases=("batchnorm",))]
