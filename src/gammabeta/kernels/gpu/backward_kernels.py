"""Batch normalization backward on the GPU, in Triton.

    dz      = activation'(z) * (grad, spread over the 2 x 2 squares and quartered where a pool followed)
    dbias   = sum(dz),  dweight = sum(dz * xhat),  xhat = (x - mean) * invstd,  z recomputed from x
    dx      = weight * invstd * (dz - dbias / n - xhat * dweight / n),  dresidual = dz

Bytes: T for x. Sums read grad and x, the second pass reads them again and writes dx: 5 T. With a residual the
sums' pass stores dz, which is the residual's gradient, so that the second pass reads dz and x only: 7 T.
Where one program owns a channel the second reading is from cache: 3 T, the fewest there can be, or 5 T with a
residual.
"""

import triton
import triton.language as tl

from .tiles import activate_backward, extents, load_affine, locate, tile_count


@triton.jit
def load_grad(
    grad_ptr, q, c0, N, C, S, H, W, cells, cols,
    POOL: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
    BC: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """The gradient at every cell of tile ``q``, ``(BC, BN * BS)`` float32, quartered where it is a pool's."""
    start, offsets, mask = locate(q, c0, None, N, C, S, H, W, cells, cols, POOL, ROWS, WIDE, BC, BN, BS)
    g = tl.load(grad_ptr + start + offsets, mask=mask, other=0.0, eviction_policy=POLICY).to(tl.float32)
    if POOL == 2:
        g = g * 0.25
    return g


@triton.jit
def load_dz(
    g, x_ptr, residual_ptr, start, offsets, mask, mean, invstd, scale, bias,
    ACT: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """``(dz, xhat)`` where ``x`` lies at ``start + offsets``; ``g``: the gradient after the activation."""
    d = tl.load(x_ptr + start + offsets, mask=mask, other=0.0, eviction_policy=POLICY).to(tl.float32) - mean
    z = d * scale + bias
    if residual_ptr is not None:
        z += tl.load(residual_ptr + start + offsets, mask=mask, other=0.0, eviction_policy=POLICY).to(
            tl.float32
        )
    # A place outside the tensor counts for nothing, whatever the activation's derivative is there.
    return tl.where(mask, activate_backward(g, z, ACT), 0.0), d * invstd


@triton.jit
def sums(
    grad_ptr, x_ptr, residual_ptr, dz_ptr, mean, invstd, scale, bias, first, step, c0,
    N, C, S, H, W, cells, cols,
    ACT: tl.constexpr, POOL: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
    BC: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """``(sum_dz, sum_dz_xhat)`` ``(BC,)``, over tiles ``first, first + step, ...``; stores dz if asked."""
    total = tl.zeros((BC, BN * BS), tl.float32)
    product = tl.zeros((BC, BN * BS), tl.float32)
    for q in tl.range(first, tile_count(N, cells, BN, BS), step, num_stages=3):
        g = load_grad(grad_ptr, q, c0, N, C, S, H, W, cells, cols, POOL, ROWS, WIDE, BC, BN, BS, "")
        for corner in tl.static_range(POOL * POOL):
            start, offsets, mask = locate(
                q, c0, corner, N, C, S, H, W, cells, cols, POOL, ROWS, WIDE, BC, BN, BS
            )
            dz, xhat = load_dz(
                g, x_ptr, residual_ptr, start, offsets, mask, mean, invstd, scale, bias, ACT, ""
            )
            total += dz
            product += dz * xhat
            if dz_ptr is not None:
                tl.store(dz_ptr + start + offsets, dz.to(dz_ptr.dtype.element_ty), mask=mask)
    return tl.sum(total, axis=1), tl.sum(product, axis=1)


@triton.jit
def input_gradient_tile(
    grad_ptr, x_ptr, residual_ptr, dx_ptr, dz_ptr, mean, invstd, scale, bias, mean_dz, mean_dz_xhat,
    q, c0, N, C, S, H, W, cells, cols,
    ACT: tl.constexpr, POOL: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
    BC: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """One tile of dx and, if it has a place, of dz; everything per channel is ``(BC, 1)``."""
    g = load_grad(grad_ptr, q, c0, N, C, S, H, W, cells, cols, POOL, ROWS, WIDE, BC, BN, BS, "evict_first")
    for corner in tl.static_range(POOL * POOL):
        start, offsets, mask = locate(q, c0, corner, N, C, S, H, W, cells, cols, POOL, ROWS, WIDE, BC, BN, BS)
        dz, xhat = load_dz(
            g, x_ptr, residual_ptr, start, offsets, mask, mean, invstd, scale, bias, ACT, "evict_first"
        )
        dx = scale * (dz - mean_dz - xhat * mean_dz_xhat)
        tl.store(dx_ptr + start + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dz_ptr is not None:
            tl.store(dz_ptr + start + offsets, dz.to(dz_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("N", "C", "S", "H", "W", "cells", "cols", "splits"))
def partial_sums(
    grad_ptr, x_ptr, residual_ptr, dz_ptr, part_ptr, part_xhat_ptr,
    mean_ptr, invstd_ptr, weight_ptr, bias_ptr, splits, N, C, S, H, W, cells, cols,
    ACT: tl.constexpr, POOL: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
    BC: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Program (block of channels, k): tiles k, k + splits, ...; both parts are ``(splits, C)``."""
    C, S, cells = extents(C, S, cells, VEC, ROWS, POOL)
    c0 = tl.program_id(0) * BC
    k = tl.program_id(1)
    mean, invstd, scale, bias = load_affine(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, c0, C, BC)
    sum_dz, sum_dz_xhat = sums(
        grad_ptr, x_ptr, residual_ptr, dz_ptr, mean, invstd, scale, bias, k, splits, c0,
        N, C, S, H, W, cells, cols, ACT, POOL, ROWS, WIDE, BC, BN, BS,
    )  # fmt: skip
    c = c0 + tl.arange(0, BC)
    tl.store(part_ptr + k * C + c, sum_dz, mask=c < C)
    tl.store(part_xhat_ptr + k * C + c, sum_dz_xhat, mask=c < C)


@triton.jit(do_not_specialize=("C", "splits"))
def merge_sums(
    part_ptr, part_xhat_ptr, sum_dz_ptr, sum_dz_xhat_ptr, C, splits, BC: tl.constexpr, BK: tl.constexpr
):
    """``(splits, C)`` to ``(C,)``, twice, in a fixed order; ``BK >= splits``."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    k = tl.arange(0, BK)
    mask = (k < splits)[:, None] & (c < C)[None, :]
    place = k[:, None] * C + c[None, :]
    part = tl.load(part_ptr + place, mask=mask, other=0.0)
    part_xhat = tl.load(part_xhat_ptr + place, mask=mask, other=0.0)
    tl.store(sum_dz_ptr + c, tl.sum(part, axis=0), mask=c < C)
    tl.store(sum_dz_xhat_ptr + c, tl.sum(part_xhat, axis=0), mask=c < C)


@triton.jit(do_not_specialize=("N", "C", "S", "H", "W", "cells", "cols"))
def whole_channels_backward(
    grad_ptr, x_ptr, residual_ptr, dx_ptr, dz_ptr, sum_dz_ptr, sum_dz_xhat_ptr,
    mean_ptr, invstd_ptr, weight_ptr, bias_ptr, per_value, N, C, S, H, W, cells, cols,
    ACT: tl.constexpr, POOL: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
    BC: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """A program owns a block of channels: both sums, then dx, last tiles first."""
    C, S, cells = extents(C, S, cells, VEC, ROWS, POOL)
    c0 = tl.program_id(0) * BC
    mean, invstd, scale, bias = load_affine(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, c0, C, BC)
    # dz is stored in the second pass: storing it here and reading it there would need a barrier between the
    # two.
    sum_dz, sum_dz_xhat = sums(
        grad_ptr, x_ptr, residual_ptr, None, mean, invstd, scale, bias, 0, 1, c0,
        N, C, S, H, W, cells, cols, ACT, POOL, ROWS, WIDE, BC, BN, BS,
    )  # fmt: skip
    c = c0 + tl.arange(0, BC)
    tl.store(sum_dz_ptr + c, sum_dz, mask=c < C)
    tl.store(sum_dz_xhat_ptr + c, sum_dz_xhat, mask=c < C)
    mean_dz = (sum_dz * per_value)[:, None]
    mean_dz_xhat = (sum_dz_xhat * per_value)[:, None]
    last = tile_count(N, cells, BN, BS) - 1
    for i in range(last + 1):
        input_gradient_tile(
            grad_ptr, x_ptr, residual_ptr, dx_ptr, dz_ptr, mean, invstd, scale, bias, mean_dz, mean_dz_xhat,
            last - i, c0, N, C, S, H, W, cells, cols, ACT, POOL, ROWS, WIDE, BC, BN, BS,
        )  # fmt: skip


@triton.jit(do_not_specialize=("N", "C", "S", "H", "W", "cells", "cols"))
def input_gradient(
    grad_ptr, x_ptr, residual_ptr, dx_ptr, dz_ptr, mean_dz_ptr, mean_dz_xhat_ptr,
    mean_ptr, invstd_ptr, weight_ptr, bias_ptr, per_value, N, C, S, H, W, cells, cols,
    ACT: tl.constexpr, POOL: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
    BC: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """One tile a program, the last tile first: it is what the sums left in cache."""
    C, S, cells = extents(C, S, cells, VEC, ROWS, POOL)
    blocks = tl.cdiv(C, BC)
    pid = tl.program_id(0)
    c0 = (pid % blocks) * BC
    q = tile_count(N, cells, BN, BS) - 1 - pid // blocks
    mean, invstd, scale, bias = load_affine(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, c0, C, BC)
    c = c0 + tl.arange(0, BC)
    mean_dz = (tl.load(mean_dz_ptr + c, mask=c < C, other=0.0) * per_value)[:, None]
    mean_dz_xhat = (tl.load(mean_dz_xhat_ptr + c, mask=c < C, other=0.0) * per_value)[:, None]
    input_gradient_tile(
        grad_ptr, x_ptr, residual_ptr, dx_ptr, dz_ptr, mean, invstd, scale, bias, mean_dz, mean_dz_xhat,
        q, c0, N, C, S, H, W, cells, cols, ACT, POOL, ROWS, WIDE, BC, BN, BS,
    )  # fmt: skip
