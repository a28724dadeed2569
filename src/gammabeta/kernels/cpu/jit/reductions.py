"""The small kernels that run on one thread: finish the sums of all parts, and hand parts to threads.

Everything here is per channel, so its time does not matter; that every total is float64 does.
"""

import math

from llvmlite import ir
from numba.core import types

from ..arguments import Arguments, Job, RunningArguments
from .loads import get_f32, get_f64, put_f32, put_i64
from .record import takes
from .simd import I64, inlined, instructions, intrinsic


@inlined
def _middle(a, b, c):
    """The second greatest of three."""
    return max(min(a, b), min(max(a, b), c))


@inlined
def middle_of_five(a, b, d, e, f):
    """The third greatest of five."""
    return _middle(d, max(min(a, b), min(e, f)), min(max(a, b), max(e, f)))


def shift_of(storage):
    """What a channel's sums are about: the middle one of five values, no outlier unless three of them are.

    They lie far apart, each at another place of another image: images may be alike, and so may rows.
    """
    get, size = storage.get, storage.size

    @inlined
    def shift(args, c, channel_step, value_step):
        """Of channel ``c``; the steps are elements from a channel, and from a value, to the next."""
        plane = args.height * args.width
        image_step, images, last = plane * args.channels, args.images - 1, plane - 1
        start = args.x + c * channel_step * size
        a = get(start, 0)
        b = get(start, images // 4 * image_step + last // 4 * value_step)
        d = get(start, images // 2 * image_step + last // 2 * value_step)
        e = get(start, images * 3 // 4 * image_step + last * 3 // 4 * value_step)
        f = get(start, images * image_step + last * value_step)
        return float(middle_of_five(a, b, d, e, f))

    return shift


@inlined
def put_statistics(args, c, first, one, two, count):
    """Mean, biased variance and ``1 / sqrt(var + eps)`` of a channel from its sums of ``count`` values.

    The sums are Σ(x - k) and Σ(x - k)², k being ``first``, a value of the channel itself. The subtraction
    costs a factor 1 + (k - mean)² / var of precision, n at most: ``shift_of`` keeps it small.
    """
    off = one / count
    v = two / count - off * off
    if v < 0.0:
        v = 0.0
    put_f32(args.mean, c, first + off)
    put_f32(args.var, c, v)
    if args.invstd != 0:
        put_f32(args.invstd, c, 1.0 / math.sqrt(v + args.eps))


@inlined
def _sums_of_parts(args, c):
    """Both sums of a channel over all parts, in the order of the parts."""
    channels, one, two = args.channels, 0.0, 0.0
    for part in range(args.image_parts):
        one += get_f64(args.sums, 2 * part * channels + c)
        two += get_f64(args.sums, (2 * part + 1) * channels + c)
    return one, two


@inlined
def _count_of(args):
    """Values of a channel: all, or what a mask keeps."""
    return args.kept if args.kept != 0 else args.images * args.height * args.width


@takes(Arguments)
def finish_statistics(storage, activation, residual, pool):
    """The statistics of every channel from the parts' sums, and k, which stands behind them."""

    def kernel(args, part):
        count = _count_of(args)
        for c in range(args.channels):
            one, two = _sums_of_parts(args, c)
            first = get_f64(args.sums, 2 * args.image_parts * args.channels + c)
            put_statistics(args, c, first, one, two, count)

    return kernel


@takes(Arguments)
def finish_gradients(storage, activation, residual, pool):
    """Per channel: Σdz and Σdz·xhat from the parts' Σdz and Σdz·(x - mean), and both divided by the count."""

    def kernel(args, part):
        count = _count_of(args)
        for c in range(args.channels):
            one, two = _sums_of_parts(args, c)
            two *= get_f32(args.invstd, c)
            put_f32(args.dbias, c, one)
            put_f32(args.dweight, c, two)
            if args.mean_dz != 0:
                put_f32(args.mean_dz, c, one / count)
                put_f32(args.mean_dz_xhat, c, two / count)

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
        return builder.atomic_rmw("add", pointer, ir.Constant(I64, 1), "seq_cst")

    return types.int64(job), codegen


@instructions(types.void, types.int64, types.int64, types.int64)
def _call(builder, function, args, part):
    """Call the kernel at address ``function``."""
    kind = ir.FunctionType(ir.VoidType(), [I64, I64])
    builder.call(builder.inttoptr(function, kind.as_pointer()), [args, part])


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
