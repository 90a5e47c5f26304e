"""The passes over a tensor: every form of them computes the same as the plain one in double precision."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from cilnorm_norms import _passes
from cilnorm_norms._passes import channels_last, native, plain
from cilnorm_norms._passes.plain import Pair

FORMS = {
    native: torch.contiguous_format,
    channels_last: torch.channels_last,
}
SPLITS = [(48, 16, 64), (48, 1, 64), (6, 6, 8), (8, 4, 8)]  # current rows, lanes, rows


@pytest.fixture(params=["at once", "in blocks"], autouse=True)
def _size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is small is worked through at once, and here in blocks, too."""
    if request.param == "in blocks":
        monkeypatch.setattr(channels_last, "SMALL", 0)


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
    wide = Pair(*(value.double() for value in plain.moments(x.double(), current, lanes)[0]))
    mean = Pair(*(value.to(dtype) for value in wide))

    close(passes.moments(x, current, lanes), plain.moments(x.double(), current, lanes), tolerance)
    close(passes.sums(g, x, current, mean), plain.sums(g.double(), x.double(), current, wide), 10 * tolerance)
    y, dx = passes.affine(x, current, mean, scale, shift), passes.gradient(g, x, current, mean, factor, scale, shift)
    torch.testing.assert_close(y, plain.affine(x, current, mean, scale, shift), rtol=tolerance, atol=tolerance)
    expected = plain.gradient(g, x, current, mean, factor, scale, shift)
    torch.testing.assert_close(dx, expected, rtol=tolerance, atol=tolerance)
    assert y.is_contiguous(memory_format=layout)
    assert dx.is_contiguous(memory_format=layout)


@pytest.mark.parametrize(("current", "lanes", "rows"), SPLITS)
@pytest.mark.parametrize("passes", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_summed_in_float32_and_rounded_once(
    passes: ModuleType, current: int, lanes: int, rows: int, dtype: torch.dtype
) -> None:
    """What is written is the nearest value that there is, and statistics are as good as of float32."""
    generator = torch.Generator().manual_seed(rows + lanes)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    layout = FORMS[passes]
    x = (some(rows, 5, 40, 50) + 20).to(dtype).contiguous(memory_format=layout)
    g = some(rows, 5, 40, 50).to(dtype).contiguous(memory_format=layout)
    values = [Pair(some(lanes, 5), some(5)) for _ in range(3)]
    scale, shift, factor = values
    wide = [Pair(*(value.double() for value in pair)) for pair in values]
    expected = plain.moments(x.double(), current, lanes)
    mean = Pair(*(value.float() for value in expected[0]))
    mean_wide = Pair(*(value.double() for value in mean))

    found = passes.moments(x, current, lanes)
    assert {value.dtype for pair in found for value in pair} == {torch.float32}
    close(found, expected, 1e-4)
    sums = passes.sums(g, x, current, mean)
    assert {value.dtype for pair in sums for value in pair} == {torch.float32}
    for pair, reference in zip(sums, plain.sums(g.double(), x.double(), current, mean_wide), strict=True):
        for value, right in zip(pair, reference, strict=True):
            torch.testing.assert_close(value.double(), right, rtol=1e-4, atol=2e-5 * g[:, 0].numel() ** 0.5)
    for actual, right in (
        (
            passes.affine(x, current, mean, scale, shift),
            plain.affine(x.double(), current, mean_wide, *wide[:2]),
        ),
        (
            passes.gradient(g, x, current, mean, factor, scale, shift),
            plain.gradient(g.double(), x.double(), current, mean_wide, wide[2], *wide[:2]),
        ),
    ):
        assert actual.dtype == dtype
        assert actual.is_contiguous(memory_format=layout)
        torch.testing.assert_close(actual.double(), right, rtol=0.502 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("passes", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_are_larger_than_a_block_are_cut(passes: ModuleType, dtype: torch.dtype) -> None:
    x = torch.randn(6, 3, 220, 250, generator=torch.Generator().manual_seed(0))
    x = x.to(dtype).contiguous(memory_format=FORMS[passes])
    value = Pair(torch.linspace(1, 2, 6).view(2, 3), torch.linspace(-1, 0, 3))
    wide = Pair(*(each.double() for each in value))
    for actual, right in (
        (passes.affine(x, 4, value, value, value), plain.affine(x.double(), 4, wide, wide, wide)),
        (
            passes.gradient(x, x, 4, value, value, value, value),
            plain.gradient(x.double(), x.double(), 4, wide, wide, wide, wide),
        ),
    ):
        torch.testing.assert_close(actual.double(), right, rtol=0.502 * torch.finfo(dtype).eps, atol=5e-6)


@pytest.mark.parametrize("passes", FORMS)
def test_moments_survive_a_large_offset(passes: ModuleType) -> None:
    x = torch.randn(64, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    x = (x + 2000).contiguous(memory_format=FORMS[passes])
    variance = passes.moments(x, 48, 16)[1]
    close((variance,), (plain.moments(x.double(), 48, 16)[1],), 5e-3)


def test_the_layout_chooses_the_form() -> None:
    x = torch.randn(8, 3, 4, 4)
    assert _passes.choose(x) is native
    assert _passes.choose(x.contiguous(memory_format=torch.channels_last)) is channels_last
    for half in (x.half(), x.bfloat16()):
        assert _passes.choose(half) is native
        assert _passes.choose(half.contiguous(memory_format=torch.channels_last)) is channels_last
    assert _passes.choose(x.long()) is plain
    assert _passes.choose(x[:, :, ::2]) is plain
