"""The layer against what it stands for, written out: batch normalisation split by split, then averages."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cilnorm.batch import Composition
from cilnorm_norms._base import BatchNormBase


def one_split_at_a_time(
    x: Tensor, weight: Tensor, bias: Tensor, composition: Composition, splits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """y (N, C, H, W), and the mean and unbiased variance (C,) that the running averages follow."""
    y, past, means, variances = torch.zeros_like(x), [], [], []
    for split in range(splits):
        rows = [*range(split, composition.current, splits), *range(composition.current, composition.rows)]
        mean, var = torch.zeros_like(weight), torch.ones_like(weight)
        out = F.batch_norm(x[rows], mean, var, weight, bias, training=True, momentum=1.0)  # leaves the moments behind
        current = len(rows) - composition.past
        y = y.index_add(0, torch.tensor(rows[:current]), out[:current])
        past.append(out[current:])
        means.append(mean)
        variances.append(var)
    y = torch.cat([y[: composition.current], torch.stack(past).mean(0)])
    return y, torch.stack(means).mean(0), torch.stack(variances).mean(0)


def check(layer: BatchNormBase, splits: int, composition: Composition, channels: int = 5) -> None:
    """Compares outputs, gradients and running averages in double precision; ``layer`` was told the composition.

    Raises:
        AssertionError: they differ by more than 1e-9.
    """
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(composition.rows, channels, 4, 4, dtype=torch.double, generator=generator) for _ in range(2))
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    weight = torch.linspace(0.5, 2, channels, dtype=torch.double).requires_grad_()
    bias = torch.linspace(-1, 1, channels, dtype=torch.double).requires_grad_()
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    y = layer(found)
    y.backward(g)
    slow, mean, var = one_split_at_a_time(expected, weight, bias, composition, splits)
    slow.backward(g)
    for name, one, other in (
        ("output", y, slow),
        ("gradient of the input", found.grad, expected.grad),
        ("gradient of the scale", layer.weight.grad, weight.grad),
        ("gradient of the shift", layer.bias.grad, bias.grad),
        ("running mean", layer.running_mean, 0.1 * mean),
        ("running variance", layer.running_var, 0.9 + 0.1 * var),
    ):
        try:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
