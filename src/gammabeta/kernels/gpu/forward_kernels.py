"""Batch normalization forward on the GPU, in Triton.

    mean = sum(x) / n,  var = sum((x - mean)^2) / n  (biased),  invstd = 1 / sqrt(var + eps)
    out  = pool(activation(weight * (x - mean) * invstd + bias + residual))

Statistics are taken about the mean of the first tile that a program sees, in float32. If that tile is the
share f of what the program sums, the squared distance of its mean from the true one is at most var / f, so
the cancellation in ``sum(d^2) - sum(d)^2 / n`` costs at most the factor 1 / f (the number of tiles, tens to
hundreds) on float32's 6e-8, whatever the data. Programs' results are merged by Chan's formula in a fixed
order: no atomics, the same bits each time.

Bytes: with T bytes in x, a split reduction moves 3 T (x twice, out once) and T more for a residual; what the
second pass finds in the second-level cache, which it looks for by going backwards, comes off. Where one
program owns a channel the second reading is from cache: 2 T, the fewest there can be.
"""

import triton
import triton.language as tl

from .tiles import activate, extents, load_affine, load_scale_bias, locate, tile_count, tile_extent

INFINITY = tl.constexpr(float("inf"))


@triton.jit
def moments(
    x_ptr, c0, first, step, N, C, S,
    ROWS: tl.constexpr, WIDE: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """``(n, shift, delta, m2)`` of tiles ``first, first + step, ...``; ``(BC,)``, but ``n`` is one number.

    Their mean is ``shift + delta``, kept apart because the sum may need more digits than float32 has; ``m2``
    is the sum of squared distances from it.
    """
    start, offsets, mask = locate(first, c0, 0, N, C, S, 1, 1, S, 1, 1, ROWS, WIDE, BC, BN, BS)
    x = tl.load(x_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
    n = tile_extent(first, N, S, BN, BS).to(tl.float32)
    shift = tl.sum(x, axis=1) / n
    shift = tl.where(tl.abs(shift) < INFINITY, shift, 0.0)
    d = tl.where(mask, x - shift[:, None], 0.0)
    total = d
    square = d * d
    # Three tiles ahead are on their way to shared memory: registers would hold one, in two instalments.
    for q in tl.range(first + step, tile_count(N, S, BN, BS), step, num_stages=4):
        start, offsets, mask = locate(q, c0, 0, N, C, S, 1, 1, S, 1, 1, ROWS, WIDE, BC, BN, BS)
        x = tl.load(x_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
        d = tl.where(mask, x - shift[:, None], 0.0)
        total += d
        square += d * d
        n += tile_extent(q, N, S, BN, BS).to(tl.float32)
    sum_d = tl.sum(total, axis=1)
    delta = sum_d / n
    m2 = tl.sum(square, axis=1) - delta * sum_d
    return n, shift, delta, tl.where(m2 < 0.0, 0.0, m2)


@triton.jit
def store_statistics(mean_ptr, var_ptr, invstd_ptr, mean, var, eps, c, mask):
    """Write mean, biased variance and 1 / sqrt(var + eps); returns the last."""
    invstd = tl.div_rn(1.0, tl.sqrt_rn(var + eps))
    tl.store(mean_ptr + c, mean, mask=mask)
    tl.store(var_ptr + c, var, mask=mask)
    tl.store(invstd_ptr + c, invstd, mask=mask)
    return invstd


@triton.jit
def normalise_tile(
    x_ptr, residual_ptr, out_ptr, q, c0, mean, scale, bias, N, C, S, H, W, cells, cols,
    ACT: tl.constexpr, POOL: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
    BC: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """One tile of the output; ``mean``, ``scale`` and ``bias`` are ``(BC, 1)``."""
    y = tl.zeros((BC, BN * BS), tl.float32)
    for corner in tl.static_range(POOL * POOL):
        start, offsets, mask = locate(q, c0, corner, N, C, S, H, W, cells, cols, POOL, ROWS, WIDE, BC, BN, BS)
        x = tl.load(x_ptr + start + offsets, mask=mask, other=0.0, eviction_policy="evict_first").to(
            tl.float32
        )
        z = (x - mean) * scale + bias
        if residual_ptr is not None:
            z += tl.load(
                residual_ptr + start + offsets, mask=mask, other=0.0, eviction_policy="evict_first"
            ).to(tl.float32)
        y += activate(z, ACT)
    if POOL == 2:
        y = y * 0.25
        start, offsets, mask = locate(q, c0, None, N, C, S, H, W, cells, cols, POOL, ROWS, WIDE, BC, BN, BS)
    tl.store(out_ptr + start + offsets, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("N", "C", "S", "splits"))
def partial_statistics(
    x_ptr, part_ptr, N, C, S, splits,
    ROWS: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
    BC: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Program (block of channels, k): tiles k, k + splits, ...

    ``part`` is ``(4, splits, C)``: n, shift, delta, m2.
    """
    C, S, _ = extents(C, S, S, VEC, ROWS, 1)
    c0 = tl.program_id(0) * BC
    k = tl.program_id(1)
    n, shift, delta, m2 = moments(x_ptr, c0, k, splits, N, C, S, ROWS, WIDE, BC, BN, BS)
    c = c0 + tl.arange(0, BC)
    part_ptr += k * C + c
    tl.store(part_ptr, tl.zeros_like(m2) + n, mask=c < C)
    tl.store(part_ptr + splits * C, shift, mask=c < C)
    tl.store(part_ptr + 2 * splits * C, delta, mask=c < C)
    tl.store(part_ptr + 3 * splits * C, m2, mask=c < C)


@triton.jit(do_not_specialize=("C", "splits"))
def merge_statistics(
    part_ptr, mean_ptr, var_ptr, invstd_ptr, C, splits, eps, BC: tl.constexpr, BK: tl.constexpr
):
    """Chan's formula over the splits, relative to the first one's shift; ``BK >= splits``."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    k = tl.arange(0, BK)
    mask = (k < splits)[:, None] & (c < C)[None, :]
    part = part_ptr + k[:, None] * C + c[None, :]
    n = tl.load(part, mask=mask, other=0.0)
    first = tl.load(part_ptr + splits * C + c, mask=c < C, other=0.0)
    shift = tl.load(part + splits * C, mask=mask, other=0.0)
    delta = tl.load(part + 2 * splits * C, mask=mask, other=0.0)
    m2 = tl.load(part + 3 * splits * C, mask=mask, other=0.0)
    # Differences of shifts are exact or nearly so: the mean's own rounding does not enter the variance.
    relative = tl.where(mask, (shift - first[None, :]) + delta, 0.0)
    count = tl.sum(n, axis=0)
    count = tl.where(c < C, count, 1.0)
    centre = tl.sum(n * relative, axis=0) / count
    d = relative - centre[None, :]
    var = tl.sum(m2 + n * d * d, axis=0) / count
    store_statistics(mean_ptr, var_ptr, invstd_ptr, first + centre, var, eps, c, c < C)


@triton.jit(do_not_specialize=("N", "C", "S", "H", "W", "cells", "cols"))
def whole_channels(
    x_ptr, residual_ptr, out_ptr, mean_ptr, var_ptr, invstd_ptr, weight_ptr, bias_ptr, eps,
    N, C, S, H, W, cells, cols,
    APPLY: tl.constexpr, ACT: tl.constexpr, POOL: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
    WIDE: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """A program owns a block of channels: statistics and, with ``APPLY``, the output, last tiles first."""
    C, S, cells = extents(C, S, cells, VEC, ROWS, POOL)
    c0 = tl.program_id(0) * BC
    n, shift, delta, m2 = moments(x_ptr, c0, 0, 1, N, C, S, ROWS, WIDE, BC, BN, BS)
    c = c0 + tl.arange(0, BC)
    mean = shift + delta
    invstd = store_statistics(mean_ptr, var_ptr, invstd_ptr, mean, m2 / n, eps, c, c < C)
    if APPLY:
        scale, bias = load_scale_bias(weight_ptr, bias_ptr, invstd, c0, C, BC)
        last = tile_count(N, cells, BN, BS) - 1
        for i in range(last + 1):
            normalise_tile(
                x_ptr, residual_ptr, out_ptr, last - i, c0, mean[:, None], scale[:, None], bias[:, None],
                N, C, S, H, W, cells, cols, ACT, POOL, ROWS, WIDE, BC, BN, BS,
            )  # fmt: skip


@triton.jit(do_not_specialize=("N", "C", "S", "H", "W", "cells", "cols"))
def normalise(
    x_ptr, residual_ptr, out_ptr, mean_ptr, invstd_ptr, weight_ptr, bias_ptr, N, C, S, H, W, cells, cols,
    ACT: tl.constexpr, POOL: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
    BC: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """One tile a program, the last tile first: it is what the reduction left in cache."""
    C, S, cells = extents(C, S, cells, VEC, ROWS, POOL)
    blocks = tl.cdiv(C, BC)
    pid = tl.program_id(0)
    c0 = (pid % blocks) * BC
    q = tile_count(N, cells, BN, BS) - 1 - pid // blocks
    mean, _, scale, bias = load_affine(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, c0, C, BC)
    normalise_tile(
        x_ptr, residual_ptr, out_ptr, q, c0, mean, scale, bias,
        N, C, S, H, W, cells, cols, ACT, POOL, ROWS, WIDE, BC, BN, BS,
    )  # fmt: skip


@triton.jit(do_not_specialize=("C",))
def update_running(
    running_mean_ptr, running_var_ptr, mean_ptr, var_ptr, accepted_ptr, factor, unbias, C, BC: tl.constexpr
):  # fmt: skip
    """``running = (1 - factor) * running + factor * batch``, by one program.

    Where there is a place for ``accepted``: only if all of the batch's statistics are finite.
    """
    counted = C
    if accepted_ptr is not None:
        largest = tl.zeros((BC,), tl.float32)
        for c0 in range(0, C, BC):
            c = c0 + tl.arange(0, BC)
            mean = tl.load(mean_ptr + c, mask=c < C, other=0.0)
            var = tl.load(var_ptr + c, mask=c < C, other=0.0)
            largest = tl.where(tl.abs(mean) < INFINITY, largest, INFINITY)
            largest = tl.where(tl.abs(var) < INFINITY, largest, INFINITY)
        worst = tl.max(largest, axis=0)
        tl.store(accepted_ptr, tl.where(worst == 0.0, 1, 0).to(tl.uint8))
        counted = tl.where(worst == 0.0, C, 0)
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        mean = tl.load(mean_ptr + c, mask=c < C, other=0.0)
        var = tl.load(var_ptr + c, mask=c < C, other=0.0) * unbias
        old_mean = tl.load(running_mean_ptr + c, mask=c < C, other=0.0)
        old_var = tl.load(running_var_ptr + c, mask=c < C, other=0.0)
        new_mean = mean * factor + old_mean * (1.0 - factor)
        new_var = var * factor + old_var * (1.0 - factor)
        tl.store(running_mean_ptr + c, new_mean, mask=c < counted)
        tl.store(running_var_ptr + c, new_var, mask=c < counted)
