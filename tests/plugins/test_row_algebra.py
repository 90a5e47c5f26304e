"""The gradient that task-balanced rows know by heart is the one that autograd finds; moments by planes are exact."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from cilnorm_norms._row_moments import _moments_of_planes
from cilnorm_norms._task_balanced.rows import RowAlgebra, plan_rows
from cilnorm_norms.task_balanced import RowRule

ROWS, CHANNELS = 16, 5
PAST = torch.arange(ROWS).remainder(4) == 1


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.double)


@pytest.mark.parametrize(
    ("rule", "balanced", "affine"),
    itertools.product(
        [RowRule("released", 5), RowRule("exact", 5), RowRule("released", 5, "batch")], [True, False], [True, False]
    ),
    ids=str,
)
def test_its_gradient_is_that_of_autograd(rule: RowRule, balanced: bool, affine: bool) -> None:
    torch.manual_seed(0)
    algebra = RowAlgebra(plan_rows(PAST, rule, balanced).plan(torch.double), 1e-5)
    moments = [100 + drawn(ROWS, CHANNELS), drawn(ROWS, CHANNELS).square()]
    parameters = [drawn(CHANNELS), drawn(CHANNELS)] if affine else []
    inputs = [value.requires_grad_() for value in (*moments, *parameters)]
    values = parameters or [None, None]
    upstream = [drawn(ROWS, CHANNELS), drawn(ROWS, CHANNELS)]

    called = algebra(*moments, *values)
    wanted = torch.autograd.grad(called[:2], inputs, upstream)
    with torch.no_grad():
        found, kept = algebra.forward(*moments, *values)
        gradients = algebra.gradient(kept, *upstream)

    torch.testing.assert_close(found, called, rtol=0, atol=1e-12)
    for gradient, expected in zip(gradients, wanted, strict=False):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)
    assert [gradient is None for gradient in gradients] == [False, False, not affine, not affine]
    assert not any(value.requires_grad for value in called[2:])


@pytest.mark.parametrize("shape", [(7, 3, 8, 8), (3, 70, 4, 4), (2, 3, 5, 3), (1, 1, 1, 1), (2, 2, 600, 600)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_moments_of_planes_hold_far_from_zero(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = 1000 + torch.randn(*shape, dtype=dtype)
    var, mean = torch.var_mean(x.double(), (2, 3), correction=0)
    found_mean, found_var = _moments_of_planes(x)
    bound = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(found_mean.double(), mean, rtol=bound, atol=0)
    torch.testing.assert_close(found_var.double(), var, rtol=20 * bound, atol=1e-12)
