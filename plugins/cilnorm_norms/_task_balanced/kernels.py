"""The kernels behind ``_task_balanced_triton``, which says what each is for.

n is a row, c are channels, p pixels of a row, s is a split. Rows before ``current`` are current ones, and row n of them
is in split n mod ``splits``.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_moments(
    x, row_mean, row_var, channels, area, stride_n, stride_c, stride_p, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
):
    n = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = x + n.to(tl.int64) * stride_n + c[:, None] * stride_c
    mean = tl.zeros([BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, area, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)[None, :]
        here = (c[:, None] < channels) & (p < area)
        value = tl.load(row + p * stride_p, mask=here, other=0.0).to(tl.float32)
        more = tl.minimum(area - start, BLOCK_P).to(tl.float32)
        tile_mean = tl.sum(value, 1) / more
        away = tl.where(here, value - tile_mean[:, None], 0.0)
        gap = tile_mean - mean
        share = more / (start + more)
        # Chan's formula, tile by tile: one pass, and no difference of large squares.
        mean += gap * share
        squares += tl.sum(away * away, 1) + gap * gap * share * start
    out = n * channels + c
    tl.store(row_mean + out, mean, mask=c < channels)
    tl.store(row_var + out, squares / area, mask=c < channels)


@triton.jit
def pooled(row_mean, row_var, n, valid, c, count, channels):
    """Mean and variance over some rows, from those of each."""
    here = valid[:, None] & (c[None, :] < channels)
    at = n[:, None] * channels + c[None, :]
    means = tl.load(row_mean + at, mask=here, other=0.0)
    mean = tl.sum(means, 0) / count
    away = tl.where(here, means - mean[None, :], 0.0)
    variances = tl.load(row_var + at, mask=here, other=0.0)
    return mean, tl.sum(variances + away * away, 0) / count


@triton.jit
def split_moments(
    row_mean,
    row_var,
    mean,
    var,
    inverse,
    past_mean,
    rows,
    current,
    splits,
    channels,
    own_share,
    eps,
    BLOCK_OWN: tl.constexpr,
    BLOCK_PAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    s = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    own = s + tl.arange(0, BLOCK_OWN) * splits
    past = current + tl.arange(0, BLOCK_PAST)
    own_mean, own_var = pooled(row_mean, row_var, own, own < current, c, current // splits, channels)
    p_mean, p_var = pooled(row_mean, row_var, past, past < rows, c, rows - current, channels)
    gap = own_mean - p_mean
    v = p_var + (own_var - p_var) * own_share + gap * gap * own_share * (1 - own_share)
    out = s * channels + c
    tl.store(mean + out, p_mean + gap * own_share, mask=c < channels)
    tl.store(var + out, v, mask=c < channels)
    tl.store(inverse + out, 1 / tl.sqrt(v + eps), mask=c < channels)
    if s == 0:
        tl.store(past_mean + c, p_mean, mask=c < channels)


@triton.jit
def past_map(mean, inverse, past_mean, c, splits, channels, BLOCK_S: tl.constexpr):
    """What a past row meets: its centre, and means over the splits of i_s and i_s (centre − μ_s)."""
    s = tl.arange(0, BLOCK_S)[:, None]
    here = (s < splits) & (c[None, :] < channels)
    means = tl.load(mean + s * channels + c[None, :], mask=here, other=0.0)
    inverses = tl.load(inverse + s * channels + c[None, :], mask=here, other=0.0)
    centre = tl.load(past_mean + c, mask=c < channels, other=0.0)
    return centre, tl.sum(inverses, 0) / splits, tl.sum(inverses * (centre[None, :] - means), 0) / splits


@triton.jit
def store_running(mean, var, running, c, splits, channels, unbiased, BLOCK_S: tl.constexpr):
    """Means over the splits of μ_s and of the unbiased variance."""
    s = tl.arange(0, BLOCK_S)[:, None]
    here = (s < splits) & (c[None, :] < channels)
    means = tl.load(mean + s * channels + c[None, :], mask=here, other=0.0)
    variances = tl.load(var + s * channels + c[None, :], mask=here, other=0.0)
    tl.store(running + c, tl.sum(means, 0) / splits, mask=c < channels)
    tl.store(running + channels + c, unbiased * tl.sum(variances, 0) / splits, mask=c < channels)


@triton.jit
def affine_parameters(weight, bias, c, channels):
    """γ and β of some channels; 1 and 0 where there are none."""
    gamma, beta = tl.full(c.shape, 1.0, tl.float32), tl.full(c.shape, 0.0, tl.float32)
    if weight is not None:
        gamma = tl.load(weight + c, mask=c < channels, other=0.0).to(tl.float32)
        beta = tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)
    return gamma, beta


@triton.jit
def apply(
    x,
    y,
    weight,
    bias,
    mean,
    var,
    inverse,
    past_mean,
    running,
    current,
    splits,
    channels,
    area,
    unbiased,
    stride_n,
    stride_c,
    stride_p,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    n, c = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    gamma, shift = affine_parameters(weight, bias, c, channels)
    if n < current:
        centre = tl.load(mean + (n % splits) * channels + c, mask=c < channels, other=0.0)
        scale = gamma * tl.load(inverse + (n % splits) * channels + c, mask=c < channels, other=0.0)
    else:
        centre, inverse_mean, offset = past_map(mean, inverse, past_mean, c, splits, channels, BLOCK_S)
        scale, shift = gamma * inverse_mean, shift + gamma * offset
    if n == current:
        store_running(mean, var, running, c, splits, channels, unbiased, BLOCK_S)
    at = n.to(tl.int64) * stride_n + c[:, None] * stride_c
    for start in range(0, area, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)[None, :]
        here = (c[:, None] < channels) & (p < area)
        value = tl.load(x + at + p * stride_p, mask=here, other=0.0).to(tl.float32)
        tl.store(y + at + p * stride_p, (value - centre[:, None]) * scale[:, None] + shift[:, None], mask=here)


@triton.jit
def row_sums(
    g,
    x,
    mean,
    past_mean,
    total,
    dot,
    current,
    splits,
    channels,
    area,
    stride_n,
    stride_c,
    stride_p,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    n = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if n < current:
        centre = tl.load(mean + (n % splits) * channels + c, mask=c < channels, other=0.0)
    else:
        centre = tl.load(past_mean + c, mask=c < channels, other=0.0)
    at = n.to(tl.int64) * stride_n + c[:, None] * stride_c
    sum_g = tl.zeros([BLOCK_C], tl.float32)
    sum_gx = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, area, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)[None, :]
        here = (c[:, None] < channels) & (p < area)
        value = tl.load(x + at + p * stride_p, mask=here, other=0.0).to(tl.float32)
        upstream = tl.load(g + at + p * stride_p, mask=here, other=0.0).to(tl.float32)
        sum_g += tl.sum(upstream, 1)
        sum_gx += tl.sum(upstream * (value - centre[:, None]), 1)
    tl.store(total + n * channels + c, sum_g, mask=c < channels)
    tl.store(dot + n * channels + c, sum_gx, mask=c < channels)


@triton.jit
def summed(value, n, valid, c, channels):
    """The sum over some rows."""
    here = valid[:, None] & (c[None, :] < channels)
    return tl.sum(tl.load(value + n[:, None] * channels + c[None, :], mask=here, other=0.0), 0)


@triton.jit
def split_gradients(
    total,
    dot,
    weight,
    mean,
    inverse,
    past_mean,
    pull,
    slope,
    dweight,
    dbias,
    rows,
    current,
    splits,
    channels,
    inverse_count,
    own_gain,
    past_gain,
    BLOCK_OWN: tl.constexpr,
    BLOCK_PAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    s = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    own = s + tl.arange(0, BLOCK_OWN) * splits
    past = current + tl.arange(0, BLOCK_PAST)
    own_g = summed(total, own, own < current, c, channels)
    own_gx = summed(dot, own, own < current, c, channels)
    past_g = summed(total, past, past < rows, c, channels)
    at = s * channels + c
    i = tl.load(inverse + at, mask=c < channels, other=0.0)
    gap = tl.load(past_mean + c, mask=c < channels, other=0.0) - tl.load(mean + at, mask=c < channels, other=0.0)
    past_gx = summed(dot, past, past < rows, c, channels) + gap * past_g
    gamma, _ = affine_parameters(weight, weight, c, channels)
    scale = gamma * i
    tl.store(pull + at, -scale * (own_g + past_g / splits) * inverse_count, mask=c < channels)
    tl.store(slope + at, -scale * i * i * (own_gx + past_gx / splits) * inverse_count, mask=c < channels)
    tl.store(dweight + at, i * (own_gain * own_gx + past_gain * past_gx), mask=c < channels)
    tl.store(dbias + at, own_gain * own_g + past_gain * past_g, mask=c < channels)


@triton.jit
def past_terms(mean, past_mean, pull, slope, c, splits, channels, BLOCK_S: tl.constexpr):
    """Sums over the splits of a past row's coefficients: of x − centre, and of 1."""
    s = tl.arange(0, BLOCK_S)[:, None]
    here, many = (s < splits) & (c[None, :] < channels), s * channels + c[None, :]
    slopes = tl.load(slope + many, mask=here, other=0.0)
    centre = tl.load(past_mean + c, mask=c < channels, other=0.0)
    gap = centre[None, :] - tl.load(mean + many, mask=here, other=0.0)
    return tl.sum(slopes, 0), tl.sum(tl.load(pull + many, mask=here, other=0.0) + slopes * gap, 0)


@triton.jit
def apply_gradient(
    g,
    x,
    dx,
    weight,
    mean,
    inverse,
    past_mean,
    pull,
    slope,
    current,
    splits,
    channels,
    area,
    current_weight,
    stride_n,
    stride_c,
    stride_p,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    n, c = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    gamma, _ = affine_parameters(weight, weight, c, channels)
    if n < current:
        one = (n % splits) * channels + c
        centre = tl.load(mean + one, mask=c < channels, other=0.0)
        of_g = gamma * tl.load(inverse + one, mask=c < channels, other=0.0)
        of_x = current_weight * tl.load(slope + one, mask=c < channels, other=0.0)
        shift = current_weight * tl.load(pull + one, mask=c < channels, other=0.0)
    else:
        centre, inverse_mean, _ = past_map(mean, inverse, past_mean, c, splits, channels, BLOCK_S)
        of_x, shift = past_terms(mean, past_mean, pull, slope, c, splits, channels, BLOCK_S)
        of_g = gamma * inverse_mean
    at = n.to(tl.int64) * stride_n + c[:, None] * stride_c
    for start in range(0, area, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)[None, :]
        here = (c[:, None] < channels) & (p < area)
        value = tl.load(x + at + p * stride_p, mask=here, other=0.0).to(tl.float32)
        upstream = tl.load(g + at + p * stride_p, mask=here, other=0.0).to(tl.float32)
        result = upstream * of_g[:, None] + (value - centre[:, None]) * of_x[:, None] + shift[:, None]
        tl.store(dx + at + p * stride_p, result, mask=here)
