"""The small kernels that run on one thread: finish the sums of all parts, and hand parts to threads.

Everything here is per channel, so its time does not matter; that every total is float64 does.
"""

import math

from llvmlite import ir
from numba.core import types

from ..arguments import (
    CHANNELS,
    DBIAS,
    DWEIGHT,
    EPS,
    FACTOR,
    HEIGHT,
    IMAGE_PARTS,
    IMAGES,
    INVSTD,
    MEAN,
    MEAN_DZ,
    MEAN_DZ_XHAT,
    SKIP,
    SUMS,
    VAR,
    WIDTH,
)
from .loads import get_f32, get_f64, get_i64, put_f32, put_i64
from .simd import intrinsic


def finish_statistics(storage, activation, residual, pool):
    """Per channel: mean, biased variance and ``1 / sqrt(var + eps)`` from the parts' sums about a shift.

    ``sums`` holds, for each part, Σ(x - k) and Σ(x - k)², and after them k, a value of the channel itself.
    Because (k - mean)² ≤ n var for any such k, the subtraction costs at most a factor n of precision.
    """

    def kernel(args, part):
        sums, channels = get_i64(args, SUMS), get_i64(args, CHANNELS)
        parts = get_i64(args, IMAGE_PARTS)
        count = get_i64(args, IMAGES) * get_i64(args, HEIGHT) * get_i64(args, WIDTH)
        mean, var, invstd = get_i64(args, MEAN), get_i64(args, VAR), get_i64(args, INVSTD)
        eps = get_f64(args, EPS)
        for c in range(channels):
            s = 0.0
            q = 0.0
            for p in range(parts):
                s += get_f64(sums, 2 * p * channels + c)
                q += get_f64(sums, (2 * p + 1) * channels + c)
            off = s / count
            v = q / count - off * off
            if v < 0.0:
                v = 0.0
            put_f32(mean, c, get_f64(sums, 2 * parts * channels + c) + off)
            put_f32(var, c, v)
            if invstd != 0:
                put_f32(invstd, c, 1.0 / math.sqrt(v + eps))

    return kernel


def finish_gradients(storage, activation, residual, pool):
    """Per channel: Σdz and Σdz·xhat from the parts' Σdz and Σdz·(x - mean), and both divided by the count."""

    def kernel(args, part):
        sums, channels = get_i64(args, SUMS), get_i64(args, CHANNELS)
        parts = get_i64(args, IMAGE_PARTS)
        count = get_i64(args, IMAGES) * get_i64(args, HEIGHT) * get_i64(args, WIDTH)
        dweight, dbias, invstd = get_i64(args, DWEIGHT), get_i64(args, DBIAS), get_i64(args, INVSTD)
        mean_dz, mean_dz_xhat = get_i64(args, MEAN_DZ), get_i64(args, MEAN_DZ_XHAT)
        for c in range(channels):
            s = 0.0
            q = 0.0
            for p in range(parts):
                s += get_f64(sums, 2 * p * channels + c)
                q += get_f64(sums, (2 * p + 1) * channels + c)
            q *= get_f32(invstd, c)
            put_f32(dbias, c, s)
            put_f32(dweight, c, q)
            if mean_dz != 0:
                put_f32(mean_dz, c, s / count)
                put_f32(mean_dz_xhat, c, q / count)

    return kernel


def update_running(storage, activation, residual, pool):
    """``running = (1 - factor) * running + factor * batch``, the variance made unbiased by n / (n - 1).

    ``mean`` and ``var`` are the batch's (biased), ``dweight`` and ``dbias`` the slots of the running mean and
    variance. Where ``skip`` is set and a value is not finite, nothing is written and ``sums`` gets 0.
    """

    def kernel(args, part):
        mean, var, channels = get_i64(args, MEAN), get_i64(args, VAR), get_i64(args, CHANNELS)
        running_mean, running_var = get_i64(args, DWEIGHT), get_i64(args, DBIAS)
        count, factor = get_i64(args, IMAGES), get_f64(args, FACTOR)
        finite = True
        for c in range(channels):
            finite = finite and math.isfinite(get_f32(mean, c)) and math.isfinite(get_f32(var, c))
        put_i64(get_i64(args, SUMS), 0, 1)
        if get_i64(args, SKIP) != 0 and not finite:
            put_i64(get_i64(args, SUMS), 0, 0)
            return
        unbiased = count / (count - 1.0)
        for c in range(channels):
            m, v = get_f32(running_mean, c), get_f32(running_var, c)
            put_f32(running_mean, c, (1.0 - factor) * m + factor * get_f32(mean, c))
            put_f32(running_var, c, (1.0 - factor) * v + factor * (unbiased * get_f32(var, c)))

    return kernel


@intrinsic
def _take(typingctx, address):
    """The number at ``address``, which becomes one more; no two threads take the same."""

    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], ir.PointerType())
        return builder.atomic_rmw("add", pointer, ir.Constant(ir.IntType(64), 1), "seq_cst")

    return types.int64(types.int64), codegen


@intrinsic
def _call(typingctx, function, args, part):
    """Call the kernel at address ``function``."""

    def codegen(context, builder, sig, args):
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64), ir.IntType(64)])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


def work(storage, activation, residual, pool):
    """What every thread of a team runs: take the next part and run it, until none is left.

    Its argument is the address of four int64: the next part, the number of parts, the kernel, its slots.
    How the work was cut decides the result, never who did it; a team smaller than asked for is as good.
    """

    def kernel(job, unused):
        parts, function, args = get_i64(job, 1), get_i64(job, 2), get_i64(job, 3)
        part = _take(job)
        while part < parts:
            _call(function, args, part)
            part = _take(job)

    return kernel
