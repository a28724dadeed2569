"""Channels-last tensors, and (N, C), backward. Tiles and tables are those of ``channels_last``.

Maths: see ``gammabeta.kernels``. Memory moved, in units of x: reduce reads 2 (1¼ with pooling, 1 more with a
residual) and writes 1 where the residual wants its gradient, which is dz; apply reads 2 and writes 1. The
activation's derivative is taken again from x.
"""

from ..arguments import Arguments
from .channels_last import TOGETHER, ahead, walk_of
from .loads import fence, float32, float64, prefetch, prefetch_write
from .max_pool import spread_row_of, window_of
from .pointwise import backward_run, dx_of, dz_of
from .record import takes
from .simd import fma, inlined, splat, widen
from .tables import (
    LINE,
    affine_at,
    affine_backward_at,
    clear,
    cut,
    memory,
    own_elements,
    spread,
    spread_means,
    sum_tables,
)

BLOCK = 128  # tiles whose sums are float32

_load, _store = float32.load, float32.store
_load_some, _store_some = float32.load_some, float32.store_some
_load_wide, _store_wide = float64.load, float64.store


# --- the gradient, and the runs of a part -----------------------------------------------------------------


def _runs_of(storage, pool, work):
    """All of a part's elements, as runs: ``work(args, run, elements, table, pending) -> pending``.

    A pooled gradient is spread into a float32 line, row by row, and a run is a row then.
    """
    size = storage.size
    if pool:
        most, spread_line = _line_of(storage, pool)

        @inlined
        def runs(args, part, table):
            line, elements, pending = table + LINE * args.tile, args.width * args.channels, 0
            lines = (args.height + most - 1) // most
            units = args.images * lines
            for unit in range(cut(units, args.image_parts, part), cut(units, args.image_parts, part + 1)):
                image, row = unit // lines, unit % lines
                for which in range(spread_line(args, line, image, row)):
                    here = (image * args.height + most * row + which) * elements * size
                    pending = work(args, backward_run(args, here, line), elements, table, pending)

    else:

        @inlined
        def runs(args, part, table):
            start, stop = own_elements(args, part)
            here = start * size
            work(args, backward_run(args, here, args.grad + here), stop - start, table, 0)

    return runs


def _line_of(storage, pool):
    """How many rows of pixels a line serves at most, and what fills it and returns how many it serves."""
    window = window_of(pool)
    if window is None:
        return 2, _spread_pair_of(storage)
    spread_row = spread_row_of(storage, window)

    @inlined
    def spread_line(args, line, image, row):
        spread_row(args, line, image, row)
        return 1

    return 1, spread_line


def _spread_pair_of(storage):
    """The gradient of two rows of pixels from that of the row pooled from them; an odd last row has none."""
    load, load_some, size = storage.load, storage.load_some, storage.size

    @inlined
    def clear_some(line, start, count):
        for v in range(0, count, 16):
            _store_some(line, start + v, splat(0.0), min(16, count - v))

    @inlined
    def spread_quarters(grad, line, width, channels):
        """A quarter to each of a pair of pixels, zero for an odd last one."""
        quarter = splat(0.25)
        for i in range(width // 2):
            left, right, here = 2 * i * channels, (2 * i + 1) * channels, i * channels
            if channels < 16:
                g = load_some(grad, here, channels) * quarter
                _store_some(line, left, g, channels)
                _store_some(line, right, g, channels)
            else:
                for v in range(0, channels, 16):
                    w = min(v, channels - 16)
                    g = load(grad, here + w) * quarter
                    _store(line, left + w, g)
                    _store(line, right + w, g)
        if width % 2 == 1:
            clear_some(line, (width - 1) * channels, channels)

    @inlined
    def spread_pair(args, line, image, row):
        if 2 * row + 1 == args.height:
            clear_some(line, 0, args.width * args.channels)
            return 1
        pooled = (image * (args.height // 2) + row) * (args.width // 2) * args.channels
        spread_quarters(args.grad + pooled * size, line, args.width, args.channels)
        return 2

    return spread_pair


def _fetch_of(residual, pool):
    """Ask for what is ``line`` bytes from the start of a run; a line of gradients is near already."""
    pooled = bool(pool)

    @inlined
    def fetch(run, line):
        prefetch(run.x + line)
        if residual:
            prefetch(run.residual + line)
        if not pooled:
            prefetch(run.grad + line)

    return fetch


# --- reduce -----------------------------------------------------------------------------------------------
#
# Tables 5 and 6 are the sums of a block; from 8 on two float64 tables: the sums of all blocks.


@takes(Arguments)
def channels_last_reduce(storage, activation, residual, pool):
    """Σdz and Σdz·(x - mean) of each part: float32 over some tens of tiles, float64 over those.

    Where the residual wants its gradient dz is written too, for the residual and for the second pass.
    """
    reduce_run = reduce_run_of(storage, residual, pool, dz_of(storage, activation, residual))
    return reduce_kernel_of(_runs_of(storage, pool, reduce_run))


def reduce_kernel_of(runs):
    """``runs(args, part, table)`` between the tables of parameters and the sums of all blocks."""

    def kernel(args, part):
        table, tile = memory(args, part), args.tile
        spread(args, table)
        clear(table + 20 * tile, 2 * tile)
        clear(table + 32 * tile, 4 * tile)
        runs(args, part, table)
        flush_block(table, tile)
        sum_tables(args, part, table + 32 * tile)

    return kernel


@inlined
def flush_block(table, tile):
    """Add the float32 sums to the float64 ones, and clear them."""
    wide = table + 32 * tile
    for v in range(0, 2 * tile, 16):
        _store_wide(wide, v, _load_wide(wide, v) + widen(_load(table, 5 * tile + v)))
        _store(table, 5 * tile + v, splat(0.0))


def reduce_run_of(storage, residual, pool, gradients):
    """Add a run (``dz_of``) to the sums; ``pending`` tiles are in them since they were last flushed."""
    store, store_some, size = storage.store, storage.store_some, storage.size
    load, load_some = (_load, _load_some) if pool else (storage.load, storage.load_some)
    (whole, some), fetch = gradients, _fetch_of(residual, pool)

    @inlined
    def add(run, at, affine, sums):
        centred, dz = whole(run, at, load(run.grad, at), affine)
        if residual and run.dresidual != 0:
            store(run.dresidual, at, dz)
        return sums[0] + dz, fma(dz, centred, sums[1])

    @inlined
    def add_some(run, at, count, affine, sums):
        centred, dz = some(run, at, count, load_some(run.grad, at, count), affine)
        if residual and run.dresidual != 0:
            store_some(run.dresidual, at, dz, count)
        return sums[0] + dz, fma(dz, centred, sums[1])

    @inlined
    def add_tiles(run, at, table, tile, wanted):
        """A group of whole tiles, summed in registers; ``wanted`` is whether dz is written."""
        for v in range(0, tile, 16):
            affine, sums = affine_at(table, tile, v), (splat(0.0), splat(0.0))
            lines = ahead(at, v, tile, TOGETHER, size)
            for j in range(TOGETHER):
                line = lines + 16 * j * size
                fetch(run, line)
                here = at + j * tile + v
                centred, dz = whole(run, here, load(run.grad, here), affine)
                if wanted:
                    prefetch_write(run.dresidual + line)
                    store(run.dresidual, here, dz)
                sums = sums[0] + dz, fma(dz, centred, sums[1])
            _store(table, 5 * tile + v, _load(table, 5 * tile + v) + sums[0])
            _store(table, 6 * tile + v, _load(table, 6 * tile + v) + sums[1])

    @inlined
    def add_tile(run, at, elements, table, tile):
        """One tile, or what there is of it."""
        for v in range(0, min(tile, elements - at), 16):
            affine, count = affine_at(table, tile, v), elements - at - v
            sums = _load(table, 5 * tile + v), _load(table, 6 * tile + v)
            if count >= 16:
                sums = add(run, at + v, affine, sums)
            else:
                sums = add_some(run, at + v, count, affine, sums)
            _store(table, 5 * tile + v, sums[0])
            _store(table, 6 * tile + v, sums[1])

    @inlined
    def reduce_run(args, run, elements, table, pending):
        tile, at = args.tile, 0
        while at + TOGETHER * tile <= elements:
            if residual and run.dresidual != 0:
                add_tiles(run, at, table, tile, True)
            else:
                add_tiles(run, at, table, tile, False)
            at += TOGETHER * tile
            pending += TOGETHER
            if pending >= BLOCK:
                flush_block(table, tile)
                pending = 0
        while at < elements:
            add_tile(run, at, elements, table, tile)
            at += tile
            pending += 1
        if pending >= BLOCK:
            flush_block(table, tile)
            pending = 0
        return pending

    return reduce_run


# --- apply ------------------------------------------------------------------------------------------------


@takes(Arguments)
def channels_last_apply(storage, activation, residual, pool):
    """``dx = scale * (dz - mean_dz - xhat * mean_dz_xhat)``, and ``dz`` where the residual wants it."""
    walk = apply_walk(storage, residual, pool, dz_of(storage, activation, residual), dx_of)

    @inlined
    def apply_run(args, run, elements, table, pending):
        walk(args, run, elements, table)
        return pending

    return apply_kernel_of(_runs_of(storage, pool, apply_run))


def apply_kernel_of(runs):
    """``runs(args, part, table)`` behind the tables of parameters and means."""

    def kernel(args, part):
        table = memory(args, part)
        spread(args, table)
        spread_means(args, table)
        runs(args, part, table)
        if args.stream != 0:
            fence()

    return kernel


def apply_walk(storage, residual, pool, gradients, value):
    """Write ``value(run, at, count, centred, dz, affine)`` of a run, and dz where it is wanted."""
    store, store_some, size, stream = storage.store, storage.store_some, storage.size, storage.stream
    load, load_some = (_load, _load_some) if pool else (storage.load, storage.load_some)
    (whole, some), fetch_read = gradients, _fetch_of(residual, pool)

    @inlined
    def fetch(run, line, streamed):
        fetch_read(run, line)
        if not streamed:
            prefetch_write(run.dx + line)

    @inlined
    def put(run, at, affine, streamed):
        centred, dz = whole(run, at, load(run.grad, at), affine)
        y = value(run, at, 16, centred, dz, affine)
        if streamed:
            stream(run.dx, at, y)
        else:
            store(run.dx, at, y)
        if residual and run.dresidual != 0:
            store(run.dresidual, at, dz)

    @inlined
    def put_some(run, at, count, affine):
        centred, dz = some(run, at, count, load_some(run.grad, at, count), affine)
        store_some(run.dx, at, value(run, at, count, centred, dz, affine), count)
        if residual and run.dresidual != 0:
            store_some(run.dresidual, at, dz, count)

    return walk_of(size, affine_backward_at, fetch, put, put_some)
