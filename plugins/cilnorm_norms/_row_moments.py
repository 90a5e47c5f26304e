"""Any normalisation whose statistics are weights over rows: moments of rows, algebra on them, one map a row.

A row is one image. ``normalise`` reads x (N, C, H, W) twice going forward: for the mean and variance (N, C) of every
row and channel, and for y = scale · (x − mean of its row) + shift with a scale and a shift (N, C) a row. What lies
between is a function on (N, C) numbers that a layer writes with ordinary autograd: it may weigh rows, put them into
groups, in any order. Going backward x is read twice more, whatever that function is.

With several processes the function sees the moments of the rows of all of them, in the order of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cilnorm_norms import _passes
from cilnorm_norms._base import Ranks
from cilnorm_norms._passes.plain import statistics_dtype

aten = torch.ops.aten
Algebra = Callable[..., tuple[Tensor, ...]]
LINE = 256  # values side by side for which torch's kernels on the CPU run at full speed
BLOCK = 128 * 1024  # values; half a megabyte stays in the cache from one operation to the next
SMALL = 16  # pixels of a map, below which batch norm's kernel finds its moments soonest


@runtime_checkable
class WithGradient(Protocol):
    """Algebra that knows its own gradient, which is several times as fast as to do it anew with autograd."""

    def forward(
        self, mean: Tensor, var: Tensor, *values: Tensor | None
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """What calling it returns, and what ``gradient`` needs."""

    def gradient(
        self, kept: Sequence[Tensor | None], of_scale: Tensor, of_shift: Tensor, *of_others: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """The gradients of mean, var and the values from those (N, C) of scale and shift, and of all other outputs."""


def normalise(x: Tensor, algebra: Algebra, ranks: Ranks | None, *values: Tensor | None) -> tuple[Tensor, ...]:
    """y, and whatever else ``algebra`` returns.

    Args:
        x: (N, C, H, W).
        algebra: called with means and biased variances (N, C) of all rows and with ``values``; returns scale and shift,
            (N, C) or (1, C), then any statistics. It may be called twice and must not change anything.
        ranks: the processes that share a batch; None where this one is alone.
        values: parameters and other tensors that are to have gradients, handed through to ``algebra``.
    """
    with torch.autocast(x.device.type, enabled=False):  # which would multiply statistics in half precision
        return _normalise(x, algebra, ranks, *values)


def _normalise(x: Tensor, algebra: Algebra, ranks: Ranks | None, *values: Tensor | None) -> tuple[Tensor, ...]:
    if torch.compiler.is_compiling() and ranks is None:
        wide = x.to(statistics_dtype(x))
        var, mean = torch.var_mean(wide, (2, 3), correction=0)
        scale, shift, *others = algebra(mean, var, *values)
        y = (wide - mean[..., None, None]) * scale[..., None, None] + shift[..., None, None]
        return y.to(x.dtype), *others
    return _Normalise.apply(x, algebra, ranks, *values)


class _Normalise(torch.autograd.Function):
    """The algebra is done anew going backward: it is small, and a graph kept from the first time would outlive it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, algebra: Algebra, ranks: Ranks | None, *values: Tensor | None) -> Any:
        mean, var = moments(x)
        ctx.algebra, ctx.ranks = algebra, ranks
        ctx.set_materialize_grads(False)
        if ranks is None and isinstance(algebra, WithGradient):
            (scale, shift, *others), kept = algebra.forward(mean, var, *values)
            scale, shift = _own(None, scale, mean), _own(None, shift, mean)
            ctx.save_for_backward(x, mean, scale, *kept)
            return affine(x, mean, scale, shift), *others
        everywhere = _gather(ranks, mean, var)
        scale, shift, *others = algebra(*everywhere, *values)
        y = affine(x, mean, _own(ranks, scale, mean), _own(ranks, shift, mean))
        ctx.save_for_backward(x, mean, *everywhere, *values)
        return y, *others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None, *of_others: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.ranks is None and isinstance(ctx.algebra, WithGradient):
            return _by_its_own_gradient(ctx, g, *of_others)
        x, mean, *small = ctx.saved_tensors
        wanted = [True, True, *ctx.needs_input_grad[3:]]
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            leaves = [v if v is None else v.detach().requires_grad_(w) for v, w in zip(small, wanted, strict=True)]
            scale, shift, *others = ctx.algebra(*leaves)
            scale, shift = _own(ctx.ranks, scale, mean), _own(ctx.ranks, shift, mean)
        total = dot = None
        if g is not None:
            g = _passes.like(g, x)
            total, dot = sums(g, x, mean)
        pairs = zip((scale, shift, *others), (dot, total, *of_others), strict=True)
        reached = [(out, up) for out, up in pairs if up is not None and out.requires_grad]
        outputs, upstream = [out for out, _ in reached], [up for _, up in reached]
        inputs = [leaf for leaf, w in zip(leaves, wanted, strict=True) if w and leaf is not None]
        found = iter(torch.autograd.grad(outputs, inputs, upstream, allow_unused=True, materialize_grads=True))
        grads = [next(found) if w and leaf is not None else None for leaf, w in zip(leaves, wanted, strict=True)]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _gradient(ctx.ranks, g, x, mean, scale.detach(), total, grads[:2])
        return dx, None, None, *grads[2:]


def _by_its_own_gradient(ctx: Any, g: Tensor | None, *of_others: Tensor | None) -> tuple[Tensor | None, ...]:
    x, mean, scale, *kept = ctx.saved_tensors
    total = dot = torch.zeros_like(mean)
    if g is not None:
        g = _passes.like(g, x)
        total, dot = sums(g, x, mean)
    dmean, dvar, *of_values = ctx.algebra.gradient(kept, dot, total, *of_others)
    dx = _gradient(None, g, x, mean, scale, total, [dmean, dvar]) if ctx.needs_input_grad[0] else None
    return dx, None, None, *of_values


def _gradient(
    ranks: Ranks | None,
    g: Tensor | None,
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    total: Tensor | None,
    grads: list[Any],
) -> Tensor:
    """The gradient of x: through the map, through the mean that it subtracts, and through the moments."""
    dmean, dvar = grads
    if ranks:
        dmean, dvar = ranks.sum(torch.stack(grads)).view(2, ranks.size, *mean.shape)[:, ranks.index]
    area = x.shape[2] * x.shape[3]
    if g is None or total is None:
        return affine(x, mean, dvar * (2 / area), dmean / area)
    return gradient(g, x, mean, scale, dvar * (2 / area), torch.addcmul(dmean, scale, total, value=-1) / area)


def _gather(ranks: Ranks | None, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    if ranks is None:
        return mean, var
    everywhere = ranks.gather(torch.stack([mean, var]))
    return everywhere[:, 0].flatten(0, 1), everywhere[:, 1].flatten(0, 1)


def _own(ranks: Ranks | None, value: Tensor, mean: Tensor) -> Tensor:
    """This process's rows (N, C) of a value for all rows, or of one for every row alike (1, C)."""
    if len(value) == 1:
        return value.expand_as(mean)
    return value if ranks is None else value.view(ranks.size, *mean.shape)[ranks.index]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (N, C) of every row and channel."""
    if _lies_in_planes(x):
        return _moments_of_planes(x)
    if not _lies_in_pixels(x):
        var, mean = torch.var_mean(x.to(statistics_dtype(x)), (2, 3), correction=0)
        return mean, var
    lines, area = _lines(x), x.shape[2] * x.shape[3]
    # Squares are taken of what lies around a pilot, for E[x²] − μ² is nothing but noise where |μ| is large.
    pilot = lines[:, : max(1, lines.shape[1] // 8)].mean(1, keepdim=True)
    pilot = _repeat(pilot.view(len(x), -1, x.shape[1]).mean(1), lines)
    found = x.new_empty(2, len(x), lines.shape[2])
    for rows in _blocks(lines):
        shifted = lines[rows] - pilot[rows]
        torch.sum(shifted, 1, out=found[0, rows])
        torch.sum(shifted.square_(), 1, out=found[1, rows])
    mean, square = found.view(2, len(x), -1, x.shape[1]).sum(2).div_(area).unbind()
    var = torch.addcmul(square, mean, mean, value=-1).clamp_min_(0)
    return mean.add_(pilot[:, 0, : x.shape[1]]), var


def _moments_of_planes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Some planes at a time: their mean, then the mean square around it, while they are in the cache."""
    area = x.shape[2] * x.shape[3]
    if area < SMALL:
        mean, var = torch.batch_norm_update_stats(_planes(x), None, None, 0.0)
        return mean.view(x.shape[:2]), var.view(x.shape[:2])
    planes, count = x.view(-1, area), max(1, 2 * BLOCK // area)
    mean, norm = x.new_empty(len(planes), 1), x.new_empty(len(planes))
    around = x.new_empty(min(count, len(planes)), area)
    for at in range(0, len(planes), count):
        some = planes[at : at + count]
        rest = around[: len(some)]
        torch.sub(some, torch.mean(some, 1, keepdim=True, out=mean[at : at + count]), out=rest)
        torch.linalg.vector_norm(rest, dim=1, out=norm[at : at + count])
    return mean.view(x.shape[:2]), norm.square_().div_(area).view(x.shape[:2])


def affine(x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale · (x − centre) + shift, with values (N, C); in the precision of x."""
    if _lies_in_planes(x):
        y = torch.empty_like(x)
        _affine_of_planes(x, y, centre, scale, shift)
        return y
    if not _lies_in_pixels(x):
        y = (x.to(centre.dtype) - _wide(centre)).mul_(_wide(scale)).add_(_wide(shift))
        return y.to(x.dtype)
    y = torch.empty_like(x)
    lines, out = _lines(x), _lines(y)
    centre, scale, shift = (_repeat(value, lines) for value in (centre, scale, shift))
    for rows in _blocks(lines):
        torch.sub(lines[rows], centre[rows], out=out[rows])
        torch.addcmul(shift[rows], out[rows], scale[rows], out=out[rows])
    return y


def sums(g: Tensor, x: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Σ g and Σ g · (x − centre) of every row and channel, (N, C)."""
    if _lies_in_planes(x) and g.dtype == x.dtype:
        flat = centre.reshape(-1)
        ones = torch.ones_like(flat)
        _, dot, total = aten.native_batch_norm_backward(
            _planes(g), _planes(x), None, flat, ones, None, None, False, 0.0, [False, True, True]
        )
        return total.view_as(centre), dot.view_as(centre)
    if not (_lies_in_pixels(x) and g.dtype == x.dtype):
        wide = g.to(centre.dtype)
        return wide.sum((2, 3)), (wide * (x.to(centre.dtype) - _wide(centre))).sum((2, 3))
    lines, upstream = _lines(x), _lines(g)
    repeated = _repeat(centre, lines)
    found = x.new_empty(2, len(x), lines.shape[2])
    for rows in _blocks(lines):
        torch.sum(upstream[rows], 1, out=found[0, rows])
        torch.sum((lines[rows] - repeated[rows]).mul_(upstream[rows]), 1, out=found[1, rows])
    total, dot = found.view(2, len(x), -1, x.shape[1]).sum(2).unbind()
    return total, dot


def gradient(g: Tensor, x: Tensor, centre: Tensor, of_g: Tensor, of_x: Tensor, shift: Tensor) -> Tensor:
    """of_g · g + of_x · (x − centre) + shift, with values (N, C); in the precision of x."""
    planes, pixels = _lies_in_planes(x), _lies_in_pixels(x)
    if not (planes or pixels) or g.dtype != x.dtype:
        dx = (x.to(centre.dtype) - _wide(centre)).mul_(_wide(of_x)).add_(_wide(shift))
        return dx.add_(g.to(centre.dtype) * _wide(of_g)).to(x.dtype)
    dx = torch.empty_like(x)
    if planes:
        for rows in _blocks(x):
            _affine_of_planes(x[rows], dx[rows], centre[rows], of_x[rows], shift[rows])
            dx[rows].addcmul_(g[rows], _wide(of_g[rows]))
        return dx
    lines, upstream, out = _lines(x), _lines(g), _lines(dx)
    centre, of_g, of_x, shift = (_repeat(value, lines) for value in (centre, of_g, of_x, shift))
    for rows in _blocks(lines):
        torch.sub(lines[rows], centre[rows], out=out[rows])
        torch.addcmul(shift[rows], out[rows], of_x[rows], out=out[rows])
        out[rows].addcmul_(upstream[rows], of_g[rows])
    return dx


def _lies_in_planes(x: Tensor) -> bool:
    """Whether batch norm's own kernels on the CPU can read it as one image of N · C channels."""
    return _suits_cpu(x) and x.is_contiguous()


def _lies_in_pixels(x: Tensor) -> bool:
    """Whether it is in channels_last layout on the CPU, where convolutions run fastest."""
    return _suits_cpu(x) and x.is_contiguous(memory_format=torch.channels_last)


def _suits_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and x.numel() > 0


def _planes(x: Tensor) -> Tensor:
    """(1, N · C, H, W), as a view."""
    return x.view(1, -1, *x.shape[2:])


def _affine_of_planes(x: Tensor, out: Tensor, centre: Tensor, scale: Tensor, shift: Tensor) -> None:
    flat, unused = centre.reshape(-1), x.new_empty(0)
    aten.native_batch_norm.out(
        *(_planes(x), scale.reshape(-1), shift.reshape(-1), flat, torch.ones_like(flat), False, 0.0, 0.0),
        out=_planes(out),
        save_mean=unused,
        save_invstd=unused,
    )


def _lines(x: Tensor) -> Tensor:
    """(N, lines, pixels · C), as a view: several pixels in a line where one has few channels."""
    channels, area = x.shape[1], x.shape[2] * x.shape[3]
    pixels = max(p for p in range(1, max(1, LINE // channels) + 1) if area % p == 0)
    return x.permute(0, 2, 3, 1).view(len(x), area // pixels, pixels * channels)


def _repeat(value: Tensor, lines: Tensor) -> Tensor:
    """(N, C) as (N, 1, pixels · C)."""
    return value.repeat(1, lines.shape[2] // value.shape[1])[:, None]


def _blocks(x: Tensor) -> Iterator[slice]:
    """Some rows after another, that fit into the cache together."""
    rows = max(1, BLOCK * len(x) // x.numel())
    return (slice(at, at + rows) for at in range(0, len(x), rows))


def _wide(value: Tensor) -> Tensor:
    return value[..., None, None]
