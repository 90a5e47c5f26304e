"""The passes over a tensor: every form of them computes the same as the plain one in double precision."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from cilnorm_norms import _passes, _passes_channels_last, _passes_native, _passes_torch
from cilnorm_norms._passes_torch import Pair

FORMS = {
    _passes_native: torch.contiguous_format,
    _passes_channels_last: torch.channels_last,
}
SPLITS = [(48, 16, 64), (48, 1, 64), (6, 6, 8), (8, 4, 8)]  # current rows, lanes, rows


def close(result: tuple[Pair, Pair], expected: tuple[Pair, Pair], tolerance: float) -> None:
    for pair, reference in zip(result, expected, strict=True):
        for value, right in zip(pair, reference, strict=True):
            torch.testing.assert_close(value, right.to(value.dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("current", "lanes", "rows"), SPLITS)
@pytest.mark.parametrize("passes", FORMS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_every_form_computes_the_same(
    passes: ModuleType, current: int, lanes: int, rows: int, dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(rows + lanes)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    layout = FORMS[passes]
    x = (some(rows, 5, 3, 4) + 3).contiguous(memory_format=layout)
    g = some(rows, 5, 3, 4).contiguous(memory_format=layout)
    scale, shift, factor = (Pair(some(lanes, 5), some(5)) for _ in range(3))
    assert passes.suits(x)
    wide = Pair(*(value.double() for value in _passes_torch.moments(x.double(), current, lanes)[0]))
    mean = Pair(*(value.to(dtype) for value in wide))

    close(passes.moments(x, current, lanes), _passes_torch.moments(x.double(), current, lanes), tolerance)
    close(passes.sums(g, x, current, mean), _passes_torch.sums(g.double(), x.double(), current, wide), 10 * tolerance)
    y, dx = passes.affine(x, current, mean, scale, shift), passes.gradient(g, x, current, mean, factor, scale, shift)
    torch.testing.assert_close(y, _passes_torch.affine(x, current, mean, scale, shift), rtol=tolerance, atol=tolerance)
    expected = _passes_torch.gradient(g, x, current, mean, factor, scale, shift)
    torch.testing.assert_close(dx, expected, rtol=tolerance, atol=tolerance)
    assert y.is_contiguous(memory_format=layout)
    assert dx.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("passes", FORMS)
def test_moments_survive_a_large_offset(passes: ModuleType) -> None:
    x = torch.randn(64, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    x = (x + 2000).contiguous(memory_format=FORMS[passes])
    variance = passes.moments(x, 48, 16)[1]
    close((variance,), (_passes_torch.moments(x.double(), 48, 16)[1],), 5e-3)


def test_the_layout_chooses_the_form() -> None:
    x = torch.randn(8, 3, 4, 4)
    assert _passes.choose(x) is _passes_native
    assert _passes.choose(x.contiguous(memory_format=torch.channels_last)) is _passes_channels_last
    assert _passes.choose(x.half()) is _passes_torch
    assert _passes.choose(x[:, :, ::2]) is _passes_torch
