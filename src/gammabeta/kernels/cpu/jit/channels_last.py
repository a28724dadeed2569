"""Channels-last tensors, and (N, C), forward: rows of C values, one row a pixel.

Maths: see ``gammabeta.kernels``. Memory moved, in units of x: statistics read 1; forward reads 1 (2 with a
residual) and writes 1 (¼ with pooling).

A row of 20 channels would waste a third of sixteen lanes, so a *tile* of rows is taken at a time: as many
as make the tile's elements a multiple of sixteen, with a *table* of each parameter as long as the tile
(``tables``). Sums are kept per element of the tile too, and added up into channels at the end. Tiles are
taken several at a time, so that a table is read once for all. That is not the order of addresses, which the
processor's own prefetching wants, so each group asks for the next in that order (``ahead``).
"""

from ..arguments import Arguments
from .loads import fence, float32, float64, get_f32, prefetch, prefetch_write, put_f32, put_f64
from .max_pool import along, pool_row_of, ring_row_bytes, window_of
from .pointwise import Run, Values, centred_of, forward_of
from .record import takes
from .reductions import shift_of
from .simd import fma, inlined, splat, widen
from .tables import LINE, affine_at, clear, cut, memory, own_elements, spread, step_of, sum_tables

TOGETHER = 4  # tiles that share one reading of the tables
BLOCK = 64  # tiles whose sums are float32
SUMMED = 8  # tiles that share one reading of the sums
AHEAD = 1024  # bytes between a group of tiles and what is fetched for the next

_load, _store = float32.load, float32.store
_load_some, _store_some = float32.load_some, float32.store_some
_load_wide, _store_wide = float64.load, float64.store


@inlined
def ahead(at, v, tile, together, size):
    """Bytes from the start to the lines to fetch at vector ``v``: the next group, so many lines at a time."""
    return (at + together * (tile + v)) * size + AHEAD


# --- statistics -------------------------------------------------------------------------------------------
#
# Tables in the working memory of a part: 0 and 1 are the sums of a block about k, 3 is k; from 4 on two
# float64 tables, the sums of all blocks. With k in table 2, a power of two, LLVM picks addresses that take
# bf16 a quarter longer.


@takes(Arguments)
def channels_last_statistics(storage, activation, residual, pool):
    """Σ(x - k) and Σ(x - k)² of each part, k being a value of the channel (``reductions.shift_of``)."""
    add_block, prepare = block_sums_of(storage, centred_of(storage)), sums_prepared(shift_of(storage))

    def kernel(args, part):
        tile, table = args.tile, memory(args, part)
        prepare(args, part, table)
        at, stop = own_elements(args, part)
        while at < stop:
            block_stop = min(at + BLOCK * tile, stop)
            add_block(Values(args.x, 0), at, block_stop, table, tile)
            flush_sums(table, tile)
            at = block_stop
        sum_tables(args, part, table + 16 * tile)

    return kernel


def sums_prepared(shift):
    """Clear the tables of a part and fill that of k; part 0 hands k on."""

    @inlined
    def prepare(args, part, table):
        tile, channels = args.tile, args.channels
        shifts = table + 12 * tile
        clear(table, 2 * tile)
        clear(table + 16 * tile, 4 * tile)
        for c in range(channels):
            k = shift(args, c, 1, channels)
            for row in range(0, tile, step_of(channels)):
                put_f32(shifts, row + c, k)
        if part == 0:
            for c in range(channels):
                put_f64(args.sums, 2 * args.image_parts * channels + c, get_f32(shifts, c))

    return prepare


@inlined
def flush_sums(table, tile):
    """Add the sums of a block to those of all blocks, and clear them."""
    wide = table + 16 * tile
    for v in range(0, 2 * tile, 16):
        _store_wide(wide, v, _load_wide(wide, v) + widen(_load(table, v)))
        _store(table, v, splat(0.0))


def block_sums_of(storage, centred):
    """Add the elements ``at`` to ``stop`` of a run to the sums of a block."""
    size, (whole, some) = storage.size, centred

    @inlined
    def add_tiles(values, at, table, tile):
        """Eight whole tiles."""
        for v in range(0, tile, 16):
            k, lines = _load(table, 3 * tile + v), values.x + ahead(at, v, tile, SUMMED, size)
            s, q = splat(0.0), splat(0.0)
            for j in range(SUMMED):
                prefetch(lines + 16 * j * size)
                d = whole(values, at + j * tile + v, k)
                s = s + d
                q = fma(d, d, q)
            _store(table, v, _load(table, v) + s)
            _store(table, tile + v, _load(table, tile + v) + q)

    @inlined
    def add_tile(values, at, stop, table, tile):
        """One tile, or what there is of it."""
        for v in range(0, tile, 16):
            count = min(16, stop - at - v)
            if count > 0:
                d = some(values, at + v, count, _load(table, 3 * tile + v))
                _store(table, v, _load(table, v) + d)
                _store(table, tile + v, fma(d, d, _load(table, tile + v)))

    @inlined
    def add_block(values, at, stop, table, tile):
        while at + SUMMED * tile <= stop:
            add_tiles(values, at, table, tile)
            at += SUMMED * tile
        while at < stop:
            add_tile(values, at, stop, table, tile)
            at += tile

    return add_block


# --- forward ----------------------------------------------------------------------------------------------


@takes(Arguments)
def channels_last_forward(storage, activation, residual, pool):
    """``out = pool(activation((x - mean) * scale + bias + residual))``."""
    walk = forward_walk(storage, residual, pool, forward_of(storage, activation, residual))
    if window_of(pool) is not None:
        return _max_pooled(storage, window_of(pool), walk)
    return _mean_pooled(storage, walk) if pool else _flat(storage, walk)


def walk_of(size, parameters, fetch, put, put_some):
    """A walk over the elements of a run that begins with a tile: four tiles at a time, then one by one.

    ``parameters(table, tile, v)`` reads the tables. ``put(run, at, parameters, streamed)`` and
    ``put_some(run, at, count, parameters)`` compute and write sixteen elements, and fewer;
    ``fetch(run, line, streamed)`` asks for what is ``line`` bytes from the start of the run.
    """

    @inlined
    def put_tiles(run, at, table, tile, streamed):
        for v in range(0, tile, 16):
            affine, lines = parameters(table, tile, v), ahead(at, v, tile, TOGETHER, size)
            for j in range(TOGETHER):
                fetch(run, lines + 16 * j * size, streamed)
                put(run, at + j * tile + v, affine, streamed)

    @inlined
    def walk(args, run, elements, table):
        tile, at = args.tile, 0
        while at + TOGETHER * tile <= elements:
            if run.stream != 0:  # asked here, not for every vector
                put_tiles(run, at, table, tile, True)
            else:
                put_tiles(run, at, table, tile, False)
            at += TOGETHER * tile
        while at < elements:
            for v in range(0, min(tile, elements - at), 16):
                affine, count = parameters(table, tile, v), elements - at - v
                if count >= 16:
                    put(run, at + v, affine, False)
                else:
                    put_some(run, at + v, count, affine)
            at += tile

    return walk


def forward_walk(storage, residual, pool, activated):
    """Activate a run of elements (``forward_of``); for the mean of 2x2 each together with the one below.

    With pooling the results are float32, in working memory.
    """
    pooled, mean = bool(pool), bool(pool) and window_of(pool) is None
    target, size, stream = float32 if pooled else storage, storage.size, storage.stream
    store, store_some, (whole, some) = target.store, target.store_some, activated

    @inlined
    def fetch(run, line, streamed):
        prefetch(run.x + line)
        if residual:
            prefetch(run.residual + line)
        if mean:
            prefetch(run.x + run.below * size + line)
        elif not pooled and not streamed:
            prefetch_write(run.out + line)

    @inlined
    def put(run, at, affine, streamed):
        y = whole(run, at, affine)
        if mean:
            y = y + whole(run, at + run.below, affine)
        if not pooled and streamed:
            stream(run.out, at, y)
        else:
            store(run.out, at, y)

    @inlined
    def put_some(run, at, count, affine):
        y = some(run, at, count, affine)
        if mean:
            y = y + some(run, at + run.below, count, affine)
        store_some(run.out, at, y, count)

    return walk_of(size, affine_at, fetch, put, put_some)


def _flat(storage, walk):
    """Without pooling: a run of tiles."""
    size = storage.size

    def kernel(args, part):
        table = memory(args, part)
        spread(args, table)
        start, stop = own_elements(args, part)
        here = start * size
        run = Run(args.x + here, args.residual + here, args.out + here, 0, args.stream)
        walk(args, run, stop - start, table)
        if args.stream != 0:
            fence()

    return kernel


def _mean_pooled(storage, walk):
    """Two rows of pixels are activated and added into a line, whose neighbouring pixels are then added."""
    size = storage.size
    average_pairs = _average_pairs_of(storage)

    def kernel(args, part):
        table, height, pairs = memory(args, part), args.height // 2, args.width // 2
        line, row = table + LINE * args.tile, args.width * args.channels
        spread(args, table)
        units = args.images * height
        for unit in range(cut(units, args.image_parts, part), cut(units, args.image_parts, part + 1)):
            here = (unit // height * args.height + 2 * (unit % height)) * row * size
            run = Run(args.x + here, args.residual + here, line, row, 0)
            walk(args, run, 2 * pairs * args.channels, table)
            average_pairs(line, args.out + unit * pairs * args.channels * size, pairs, args.channels)

    return kernel


def _average_pairs_of(storage):
    """``out[i] = (line[2 i] + line[2 i + 1]) / 4``, pixel by pixel; from 16 channels vectors overlap."""
    store, store_some = storage.store, storage.store_some

    @inlined
    def average_pairs(line, out, pairs, channels):
        quarter = splat(0.25)
        for i in range(pairs):
            left, right, here = 2 * i * channels, (2 * i + 1) * channels, i * channels
            if channels < 16:
                y = _load_some(line, left, channels) + _load_some(line, right, channels)
                store_some(out, here, y * quarter, channels)
            else:
                for v in range(0, channels, 16):
                    w = min(v, channels - 16)
                    store(out, here + w, (_load(line, left + w) + _load(line, right + w)) * quarter)

    return average_pairs


def _max_pooled(storage, window, walk):
    """The rows of pixels that a row of windows reaches are activated into a ring (``max_pool``)."""
    size, kernel_size = storage.size, window[0]
    (span, side), pool_row = along(window), pool_row_of(storage, window)

    def kernel(args, part):
        table, row = memory(args, part), args.width * args.channels
        ring, rows, current, done = table + LINE * args.tile, side(args.height), -1, 0
        spread(args, table)
        units = args.images * rows
        for unit in range(cut(units, args.image_parts, part), cut(units, args.image_parts, part + 1)):
            image, i = unit // rows, unit % rows
            first, stop = span(i, args.height)
            done = max(first, done if image == current else 0)
            current = image
            for r in range(done, stop):
                here = (image * args.height + r) * row * size
                line = ring + r % kernel_size * ring_row_bytes(args)
                walk(args, Run(args.x + here, args.residual + here, line, 0, 0), row, table)
            done = stop
            pool_row(args, ring, unit * side(args.width) * args.channels, i)

    return kernel
