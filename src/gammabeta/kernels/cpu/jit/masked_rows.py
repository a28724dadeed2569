"""Channels-last tensors, and (N, C), of which a mask keeps some pixels: a training step.

A pixel is a row of C values. Work is a *unit* after the other: so many tiles (``channels_last``). Of a unit
that keeps some of its pixels each byte of the mask is repeated for the pixel's values, in working memory, so
that vectors meet their mask as they meet their parameters, wherever pixels begin. A unit that keeps nothing
is not read; its results are 0. Memory moved: of the other units as in ``channels_last``.
"""

from ..arguments import UNIT, Arguments
from .channels_last import BLOCK, block_sums_of, flush_sums, forward_walk, sums_prepared
from .channels_last_backward import apply_kernel_of, apply_walk, reduce_kernel_of, reduce_run_of
from .loads import byte, fence, repeat_byte
from .masked import (
    masked_centred_of,
    masked_dx,
    masked_dz_of,
    masked_forward_of,
    masked_run,
    masked_shift_of,
)
from .pointwise import Values, dz_of
from .record import takes
from .simd import inlined, splat, total
from .tables import LINE, cut, memory, spread, step_of, sum_tables

_NONE, _SOME, _ALL = 0, 1, 2
_load_bytes = byte.load_some


def _units_of(work, leave):
    """All units of a part: ``work(args, first, count, mask, table, pending)`` of those that keep something.

    ``first`` is the first element, ``count`` how many there are, ``mask`` where their bytes are; pending is
    handed on. ``leave(args, first, count)`` is called for those that keep nothing.
    """

    @inlined
    def units(args, part, table):
        channels, tile, whole, pending = args.channels, args.tile, False, 0
        pixels, length = args.images * args.height * args.width, UNIT * tile // step_of(channels)
        count, mask = (pixels + length - 1) // step_of(length), table + LINE * tile
        for unit in range(cut(count, args.image_parts, part), cut(count, args.image_parts, part + 1)):
            first, here = unit * length, min(length, pixels - unit * length)
            kept = _kept_in(args.mask + first, here)
            if kept == _NONE:
                leave(args, first * channels, here * channels)
            else:
                if kept == _SOME or not whole:
                    _repeat(args.mask + first, here, mask, channels)
                    whole = kept == _ALL and here == length
                pending = work(args, first * channels, here * channels, mask, table, pending)

    return units


@inlined
def _kept_in(mask, count):
    """Whether none, some or all of so many pixels are kept."""
    found, i = splat(0.0), 0
    while i < count:
        found = found + _load_bytes(mask, i, min(16, count - i))
        i += 16
    kept = total(found)
    return _NONE if kept == 0 else _ALL if kept == count else _SOME


@inlined
def _repeat(mask, pixels, target, channels):
    """Each byte so many times; up to fifteen bytes behind the last are written too."""
    for p in range(pixels):
        for c in range(0, channels, 16):
            repeat_byte(target, p * channels + c, mask + p)


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
    add_block, size = block_sums_of(storage, masked_centred_of(storage)), storage.size
    prepare = sums_prepared(masked_shift_of(storage))

    @inlined
    def add(args, first, count, mask, table, pending):
        add_block(Values(args.x + first * size, mask), 0, count, table, args.tile)
        pending += UNIT
        if pending >= BLOCK:
            flush_sums(table, args.tile)
            pending = 0
        return pending

    units = _units_of(add, _left)

    def kernel(args, part):
        table = memory(args, part)
        prepare(args, part, table)
        units(args, part, table)
        flush_sums(table, args.tile)
        sum_tables(args, part, table + 16 * args.tile)

    return kernel


@takes(Arguments)
def channels_last_masked_forward(storage, activation, residual, pool):
    """``out = activation((x - mean) * scale + bias + residual)`` where kept."""
    walk = forward_walk(storage, residual, pool, masked_forward_of(storage, activation, residual))
    zero, size = _zero_of(storage), storage.size

    @inlined
    def put(args, first, count, mask, table, pending):
        walk(args, masked_run(args, first * size, 0, mask), count, table)
        return pending

    @inlined
    def leave(args, first, count):
        zero(args.out + first * size, count)

    units = _units_of(put, leave)

    def kernel(args, part):
        table = memory(args, part)
        spread(args, table)
        units(args, part, table)
        if args.stream != 0:
            fence()

    return kernel


@takes(Arguments)
def channels_last_masked_reduce(storage, activation, residual, pool):
    """Σdz and Σdz·(x - mean) of each part; dz where the residual wants it."""
    reduce_run = reduce_run_of(storage, residual, pool, masked_dz_of(storage, activation, residual))
    size = storage.size

    @inlined
    def add(args, first, count, mask, table, pending):
        here = first * size
        return reduce_run(args, masked_run(args, here, args.grad + here, mask), count, table, pending)

    return reduce_kernel_of(_units_of(add, _left))


@takes(Arguments)
def channels_last_masked_apply(storage, activation, residual, pool):
    """``dx = scale * (dz - mean_dz - xhat * mean_dz_xhat)`` where kept, and ``dz`` for the residual."""
    # dz is 0 where nothing is kept: it may be what the residual is handed
    gradients = (masked_dz_of if residual else dz_of)(storage, activation, residual)
    walk = apply_walk(storage, residual, pool, gradients, masked_dx)
    zero, size = _zero_of(storage), storage.size

    @inlined
    def put(args, first, count, mask, table, pending):
        here = first * size
        walk(args, masked_run(args, here, args.grad + here, mask), count, table)
        return pending

    @inlined
    def leave(args, first, count):
        zero(args.dx + first * size, count)
        if residual and args.dresidual != 0:
            zero(args.dresidual + first * size, count)

    return apply_kernel_of(_units_of(put, leave))
