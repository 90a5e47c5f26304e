"""Batch norm with splits: the mixture of the whole batch in each."""

from __future__ import annotations

import pytest
import torch

from cilnorm.batch import Composition
from cilnorm_norms.split_batch import SplitBatchNorm2d


@pytest.mark.parametrize(("task", "splits"), [(1, 2), (3, 8), (9, 16)])
def test_the_mixture_of_the_batch_in_every_split(task: int, splits: int) -> None:
    """As batch norm of a split whose current rows are repeated until there are as many as in the batch."""
    layer = SplitBatchNorm2d(3, momentum=1.0, dtype=torch.double)
    layer.compose(Composition(48, 16, task))
    plain = torch.nn.BatchNorm2d(3, momentum=1.0, dtype=torch.double)
    random = torch.Generator().manual_seed(0)
    x, g = (torch.randn(64, 3, 4, 4, dtype=torch.double, generator=random) * 2 + 1 for _ in range(2))
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()

    means, out, past = [], torch.empty_like(x[:48]), []
    for split in range(splits):
        normalised = plain(torch.cat([expected[split:48:splits].repeat(splits, 1, 1, 1), expected[48:]]))
        out[split::splits], means = normalised[: 48 // splits], [*means, plain.running_mean.clone()]
        past.append(normalised[48:])
    wanted = torch.cat([out, torch.stack(past).mean(0)])
    y = layer(found)
    for each in (y, wanted):
        each.backward(g)
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=1e-9)
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad, rtol=0, atol=1e-9)
    torch.testing.assert_close(layer.running_mean, torch.stack(means).mean(0), rtol=0, atol=1e-9)
    whole = x.mean((0, 2, 3))
    torch.testing.assert_close(layer.running_mean, whole, rtol=0, atol=1e-9)  # that of the batch


def test_batches_that_can_not_be_split_are_told_of_what_splits_them() -> None:
    layer = SplitBatchNorm2d(3)
    layer.compose(Composition(16, 3, 2))
    assert layer.doubt is not None
    assert layer.doubt.endswith("so this is plain batch normalisation; take numbers with a common divisor")


@pytest.mark.parametrize("splits", ["exact", "auto", 0])
def test_what_splits_nothing_is_refused(splits: str | int) -> None:
    with pytest.raises(ValueError, match=rf"splits can't be {splits!r}; it is one of \('released', 'divisor'\)"):
        SplitBatchNorm2d(3, splits=splits)
