"""Channels-last tensors, and (N, C), of which a mask keeps some pixels: a training step.

A pixel is a row of C values. Pixels that follow each other and are all kept are a *run*, on which the
arithmetic of ``channels_last`` works as if there were no mask: its tables repeat from pixel to pixel, so a
run may begin with any. What is not kept is not read; its results are 0. Memory moved: of what is kept, as
in ``channels_last``.
"""

from ..arguments import RUN, Arguments
from .channels_last import BLOCK, block_sums_of, flush_sums, forward_walk, sums_prepared
from .channels_last_backward import apply_kernel_of, apply_walk, reduce_kernel_of, reduce_run_of
from .loads import fence, get_byte
from .masked import masked_shift_of
from .pointwise import BackwardRun, Run, Values, centred_of, dx_of, dz_of, forward_of
from .record import takes
from .simd import inlined, splat
from .tables import cut, memory, spread, step_of, sum_tables


def _runs_of(work, leave):
    """All pixels of a part: ``work(args, first, count, table, pending) -> pending`` for each run.

    ``first`` is its first element and ``count`` how many there are, ``RUN`` tiles at most.
    ``leave(args, first, count)`` is called for what lies between runs.
    """

    @inlined
    def runs(args, part, table):
        channels, pending, longest = args.channels, 0, RUN * args.tile // step_of(args.channels)
        pixels = args.images * args.height * args.width
        groups = (pixels + longest - 1) // step_of(longest)
        at = cut(groups, args.image_parts, part) * longest
        stop = min(cut(groups, args.image_parts, part + 1) * longest, pixels)
        while at < stop:
            kept, end, most = get_byte(args.mask, at), at + 1, min(at + longest, stop)
            while end < most and get_byte(args.mask, end) == kept:
                end += 1
            if kept != 0:
                pending = work(args, at * channels, (end - at) * channels, table, pending)
            else:
                leave(args, at * channels, (end - at) * channels)
            at = end

    return runs


@inlined
def _streamed(args):
    """Whether results are written past the caches: whole aligned vectors, so from wherever a run begins."""
    return args.stream if args.channels % 16 == 0 else 0


@inlined
def _backward_run(args, here):
    dresidual = args.dresidual + here if args.dresidual != 0 else 0
    grad, dx = args.grad + here, args.dx + here
    return BackwardRun(args.x + here, args.residual + here, grad, dx, dresidual, _streamed(args))


def _zero_of(storage):
    """Write zeros."""
    store, store_some = storage.store, storage.store_some

    @inlined
    def zero(address, count):
        i = 0
        while i + 16 <= count:
            store(address, i, splat(0.0))
            i += 16
        if i < count:
            store_some(address, i, splat(0.0), count - i)

    return zero


@inlined
def _left(args, first, count):
    """What is not kept adds nothing."""


@takes(Arguments)
def channels_last_masked_statistics(storage, activation, residual, pool):
    """Σ(x - k) and Σ(x - k)² of each part; tables as in ``channels_last_statistics``."""
    add_block, size = block_sums_of(storage, centred_of(storage)), storage.size
    prepare = sums_prepared(masked_shift_of(storage))

    @inlined
    def add(args, first, count, table, pending):
        tile = args.tile
        add_block(Values(args.x + first * size, 0), 0, count, table, tile)
        pending += (count + tile - 1) // step_of(tile)
        if pending >= BLOCK:
            flush_sums(table, tile)
            pending = 0
        return pending

    runs = _runs_of(add, _left)

    def kernel(args, part):
        table = memory(args, part)
        prepare(args, part, table)
        runs(args, part, table)
        flush_sums(table, args.tile)
        sum_tables(args, part, table + 16 * args.tile)

    return kernel


@takes(Arguments)
def channels_last_masked_forward(storage, activation, residual, pool):
    """``out = activation((x - mean) * scale + bias + residual)`` where kept."""
    walk = forward_walk(storage, residual, pool, forward_of(storage, activation, residual))
    zero, size = _zero_of(storage), storage.size

    @inlined
    def put(args, first, count, table, pending):
        here = first * size
        run = Run(args.x + here, args.residual + here, args.out + here, 0, _streamed(args))
        walk(args, run, count, table)
        return pending

    @inlined
    def leave(args, first, count):
        zero(args.out + first * size, count)

    runs = _runs_of(put, leave)

    def kernel(args, part):
        table = memory(args, part)
        spread(args, table)
        runs(args, part, table)
        if args.stream != 0:
            fence()

    return kernel


@takes(Arguments)
def channels_last_masked_reduce(storage, activation, residual, pool):
    """Σdz and Σdz·(x - mean) of each part; dz where the residual wants it."""
    reduce_run = reduce_run_of(storage, residual, pool, dz_of(storage, activation, residual))
    size = storage.size

    @inlined
    def add(args, first, count, table, pending):
        return reduce_run(args, _backward_run(args, first * size), count, table, pending)

    return reduce_kernel_of(_runs_of(add, _left))


@takes(Arguments)
def channels_last_masked_apply(storage, activation, residual, pool):
    """``dx = scale * (dz - mean_dz - xhat * mean_dz_xhat)`` where kept, and ``dz`` for the residual."""
    walk = apply_walk(storage, residual, pool, dz_of(storage, activation, residual), dx_of)
    zero, size = _zero_of(storage), storage.size

    @inlined
    def put(args, first, count, table, pending):
        walk(args, _backward_run(args, first * size), count, table)
        return pending

    @inlined
    def leave(args, first, count):
        zero(args.dx + first * size, count)
        if residual and args.dresidual != 0:
            zero(args.dresidual + first * size, count)

    return apply_kernel_of(_runs_of(put, leave))
