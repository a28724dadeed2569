"""The small kernels that run on one thread: finish the sums of all parts, and hand parts to threads.

Everything here is per channel, so its time does not matter; that every total is float64 does.
"""

import math

from llvmlite import ir
from numba.core import types

from ..arguments import Arguments, Job, RunningArguments
from .loads import get_f32, get_f64, put_f32, put_i64
from .record import takes
from .simd import intrinsic


@takes(Arguments)
def finish_statistics(storage, activation, residual, pool):
    """Per channel: mean, biased variance and ``1 / sqrt(var + eps)`` from the parts' sums about a shift.

    ``sums`` holds, for each part, Σ(x - k) and Σ(x - k)², and after them k, a value of the channel itself.
    Because (k - mean)² ≤ n var for any such k, the subtraction costs at most a factor n of precision.
    """

    def kernel(args, part):
        sums, channels = args.sums, args.channels
        parts = args.image_parts
        count = args.images * args.height * args.width
        mean, var, invstd = args.mean, args.var, args.invstd
        eps = args.eps
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


@takes(Arguments)
def finish_gradients(storage, activation, residual, pool):
    """Per channel: Σdz and Σdz·xhat from the parts' Σdz and Σdz·(x - mean), and both divided by the count."""

    def kernel(args, part):
        sums, channels = args.sums, args.channels
        parts = args.image_parts
        count = args.images * args.height * args.width
        dweight, dbias, invstd = args.dweight, args.dbias, args.invstd
        mean_dz, mean_dz_xhat = args.mean_dz, args.mean_dz_xhat
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


@takes(RunningArguments)
def update_running(storage, activation, residual, pool):
    """``running = (1 - factor) * running + factor * batch``, the variance made unbiased by n / (n - 1).

    Where ``skip`` is set and a value of the batch is not finite, nothing is written and ``done`` gets 0.
    """

    def kernel(args, part):
        mean, var, channels = args.mean, args.var, args.channels
        running_mean, running_var = args.running_mean, args.running_var
        count, factor = args.samples, args.factor
        finite = True
        for c in range(channels):
            finite = finite and math.isfinite(get_f32(mean, c)) and math.isfinite(get_f32(var, c))
        put_i64(args.done, 0, 1)
        if args.skip != 0 and not finite:
            put_i64(args.done, 0, 0)
            return
        unbiased = count / (count - 1.0)
        for c in range(channels):
            m, v = get_f32(running_mean, c), get_f32(running_var, c)
            put_f32(running_mean, c, (1.0 - factor) * m + factor * get_f32(mean, c))
            put_f32(running_var, c, (1.0 - factor) * v + factor * (unbiased * get_f32(var, c)))

    return kernel


@intrinsic
def _take(typingctx, job):
    """The next part of a job, which becomes one more; no two threads take the same."""

    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], ir.PointerType())
        return builder.atomic_rmw("add", pointer, ir.Constant(ir.IntType(64), 1), "seq_cst")

    return types.int64(job), codegen


@intrinsic
def _call(typingctx, function, args, part):
    """Call the kernel at address ``function``."""

    def codegen(context, builder, sig, args):
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64), ir.IntType(64)])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@takes(Job)
def work(storage, activation, residual, pool):
    """What every thread of a team runs: take the next part and run it, until none is left.

    How the work was cut decides the result, never who did it; a team smaller than asked for is as good.
    """

    def kernel(job, unused):
        part = _take(job)
        while part < job.parts:
            _call(job.kernel, job.args, part)
            part = _take(job)

    return kernel
