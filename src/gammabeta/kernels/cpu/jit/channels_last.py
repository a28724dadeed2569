"""Channels-last tensors, and (N, C), forward: rows of C values, one row a pixel.

Maths: see ``gammabeta.kernels``. Memory moved, in units of x: statistics read 1; forward reads 1 (2 with a
residual) and writes 1 (¼ with pooling).

A row of 20 channels would waste a third of sixteen lanes, so a *tile* of rows is taken at a time: as many
as make the tile's elements a multiple of sixteen, with a *table* of each parameter as long as the tile
(``tables``). Sums are kept per element of the tile too, and folded into channels at the end. Tiles are
taken several at a time, so that a table is read once for all. That is not the order of addresses, which the
processor's own prefetching wants, so each group asks for the next in that order (``ahead``).
"""

from ..arguments import Arguments
from .loads import fence, float32, float64, get_f32, prefetch, prefetch_write, put_f64
from .max_pool import along, pool_row_of, window_of
from .pointwise import forward
from .record import takes
from .simd import first_lanes, fma, inlined, select, splat, splat_wide, widen
from .tables import clear, cut, fold, spread

TOGETHER = 4  # tiles that share one reading of the tables
SUMMED = 8  # tiles that share one reading of the sums
AHEAD = 1024  # bytes between a group of tiles and what is fetched for the next

_load, _store = float32.load, float32.store
_load_some, _store_some = float32.load_some, float32.store_some
_load_wide, _store_wide = float64.load, float64.store


@inlined
def ahead(at, v, tile, together, j, size):
    """Bytes from the start to line ``j`` of those to fetch at vector ``v``: the next group, line by line."""
    return (at + together * (tile + v) + 16 * j) * size + AHEAD


# --- statistics -------------------------------------------------------------------------------------------


@takes(Arguments)
def rows_statistics(storage, activation, residual, pool):
    """Σ(x - k) and Σ(x - k)² of each part, k being the channel's first value.

    Within a block of 512 tiles the sums are float32, about the mean of the block's first
    eight tiles (of equal values: the value); blocks add in float64.
    """
    load, load_some, size = storage.load, storage.load_some, storage.size

    @inlined
    def add_tail(x, at, v, count, shift, sum_at, square_at):
        d = select(first_lanes(count), load_some(x, at + v, count) - shift, splat(0.0))
        _store(sum_at, v, _load(sum_at, v) + d)
        _store(square_at, v, fma(d, d, _load(square_at, v)))

    @inlined
    def flush(table, wide_sums, tile, start_shift, block_shift, whole, left):
        """Move a block's sums, about its own shift, into the float64 ones, about the part's k."""
        for v in range(0, tile, 16):
            d = widen(_load(block_shift, v)) - widen(_load(start_shift, v))
            s = widen(_load(table, v))
            q = widen(_load(table, tile + v))
            n = splat(float(whole))
            if left > v:
                n = select(first_lanes(left - v), splat(float(whole + 1)), n)
            n = widen(n)
            _store_wide(wide_sums, v, _load_wide(wide_sums, v) + fma(n, d, s))
            two = splat_wide(2.0)
            q = q + d * fma(n, d, two * s)
            _store_wide(wide_sums, tile + v, _load_wide(wide_sums, tile + v) + q)
            _store(table, v, splat(0.0))
            _store(table, tile + v, splat(0.0))

    def kernel(args, part):
        x, channels, tile = args.x, args.channels, args.tile
        parts, sums = args.image_parts, args.sums
        total = args.images * args.height * args.width * channels
        table = args.scratch + part * args.scratch_step
        start_shift, block_shift = table + 8 * tile, table + 12 * tile
        wide_sums = table + 16 * tile
        clear(table, 2 * tile)
        clear(wide_sums, 4 * tile)
        for row in range(0, tile, channels):
            for v in range(0, channels, 16):
                count = min(16, channels - v)
                _store_some(start_shift, row + v, load_some(x, v, count), count)
        if part == 0:
            for c in range(channels):
                put_f64(sums, 2 * parts * channels + c, get_f32(start_shift, c))
        tiles = (total + tile - 1) // tile
        at = cut(tiles, parts, part) * tile
        stop = min(cut(tiles, parts, part + 1) * tile, total)
        while at < stop:
            block_stop = min(at + 512 * tile, stop)
            elements = block_stop - at
            for v in range(0, tile, 16):
                if elements >= 8 * tile:
                    k = load(x, at + v)
                    for j in range(1, 8):
                        k = k + load(x, at + j * tile + v)
                    _store(block_shift, v, k * splat(0.125))
                else:
                    _store(block_shift, v, load_some(x, at + v, max(0, min(16, elements - v))))
            while at + SUMMED * tile <= block_stop:
                for v in range(0, tile, 16):
                    k = _load(block_shift, v)
                    s, q = splat(0.0), splat(0.0)
                    for j in range(SUMMED):
                        prefetch(x + ahead(at, v, tile, SUMMED, j, size))
                        d = load(x, at + j * tile + v) - k
                        s = s + d
                        q = fma(d, d, q)
                    _store(table, v, _load(table, v) + s)
                    _store(table, tile + v, _load(table, tile + v) + q)
                at += SUMMED * tile
            while at < block_stop:
                for v in range(0, tile, 16):
                    count = min(16, block_stop - at - v)
                    if count > 0:
                        add_tail(x, at, v, count, _load(block_shift, v), table, table + 4 * tile)
                at += tile
            flush(table, wide_sums, tile, start_shift, block_shift, elements // tile, elements % tile)
        fold(args, part, wide_sums, tile)

    return kernel


# --- forward ----------------------------------------------------------------------------------------------


@takes(Arguments)
def rows_forward(storage, activation, residual, pool):
    """``out = pool(activation((x - mean) * scale + bias + residual))``.

    With the mean of 2x2, two rows of pixels are activated and added into a line of working memory, whose
    neighbouring pixels are then added. With windows the rows that one reaches are activated into a ring.
    """
    window, lined = window_of(pool), bool(pool)
    pool = lined and window is None
    store, store_some = (float32.store, float32.store_some) if lined else (storage.store, storage.store_some)
    store_out, store_out_some, stream = storage.store, storage.store_some, storage.stream
    size = storage.size

    one, one_some = forward(storage, activation, residual)

    @inlined
    def put(x, res, below, out, at, mean, scale, bias, streamed):
        y = one(x, res, at, mean, scale, bias)
        if pool:
            y = y + one(x, res, at + below, mean, scale, bias)
        if not lined and streamed:
            stream(out, at, y)
        else:
            store(out, at, y)

    @inlined
    def put_some(x, res, below, out, at, count, mean, scale, bias):
        y = one_some(x, res, at, count, mean, scale, bias)
        if pool:
            y = y + one_some(x, res, at + below, count, mean, scale, bias)
        store_some(out, at, y, count)

    @inlined
    def run(x, res, below, out, elements, table, tile, streamed):
        """Elements from 0 on of ``out``; pooled as means each is the sum of itself and the one ``below``."""
        at = 0
        while at + TOGETHER * tile <= elements:
            for v in range(0, tile, 16):
                m, s, b = _load(table, v), _load(table, tile + v), _load(table, 2 * tile + v)
                for j in range(TOGETHER):
                    line = ahead(at, v, tile, TOGETHER, j, size)
                    prefetch(x + line)
                    if residual:
                        prefetch(res + line)
                    if pool:
                        prefetch(x + below * size + line)
                    elif not lined and not streamed:
                        prefetch_write(out + line)
                    put(x, res, below, out, at + j * tile + v, m, s, b, streamed)
            at += TOGETHER * tile
        while at < elements:
            for v in range(0, min(tile, elements - at), 16):
                m, s, b = _load(table, v), _load(table, tile + v), _load(table, 2 * tile + v)
                count = elements - at - v
                if count >= 16:
                    put(x, res, below, out, at + v, m, s, b, False)
                else:
                    put_some(x, res, below, out, at + v, count, m, s, b)
            at += tile

    @inlined
    def pixel_pairs(line, out, pairs, channels):
        """``out[i] = (line[2 i] + line[2 i + 1]) / 4``, pixel by pixel; from 16 channels vectors overlap."""
        quarter = splat(0.25)
        for i in range(pairs):
            left, right, here = 2 * i * channels, (2 * i + 1) * channels, i * channels
            if channels < 16:
                y = _load_some(line, left, channels) + _load_some(line, right, channels)
                store_out_some(out, here, y * quarter, channels)
            else:
                for v in range(0, channels, 16):
                    w = min(v, channels - 16)
                    store_out(out, here + w, (_load(line, left + w) + _load(line, right + w)) * quarter)

    def flat(args, part):
        channels, tile, parts = args.channels, args.tile, args.image_parts
        table = args.scratch + part * args.scratch_step
        spread(args, table, tile)
        elements = args.images * args.height * args.width * channels
        tiles = (elements + tile - 1) // tile
        start = cut(tiles, parts, part) * tile
        count = min(cut(tiles, parts, part + 1) * tile, elements) - start
        first = start * size
        x, res, out = args.x, args.residual, args.out
        streamed = args.stream != 0
        run(x + first, res + first, 0, out + first, count, table, tile, streamed)
        if streamed:
            fence()

    def pooled(args, part):
        channels, tile, parts = args.channels, args.tile, args.image_parts
        height, width = args.height, args.width
        x, res, out = args.x, args.residual, args.out
        table = args.scratch + part * args.scratch_step
        line = table + 48 * tile
        spread(args, table, tile)
        pairs = width // 2
        units = args.images * (height // 2)
        for unit in range(cut(units, parts, part), cut(units, parts, part + 1)):
            image, row = unit // (height // 2), unit % (height // 2)
            first = (image * height + 2 * row) * width * channels * size
            run(x + first, res + first, width * channels, line, 2 * pairs * channels, table, tile, False)
            pixel_pairs(line, out + unit * pairs * channels * size, pairs, channels)

    if window is None:
        return pooled if pool else flat
    size_of_ring, (span, side), pool_row = window[0], along(window), pool_row_of(storage, window)

    def windowed(args, part):
        channels, tile, parts = args.channels, args.tile, args.image_parts
        height, width = args.height, args.width
        x, res, codes = args.x, args.residual, args.codes
        table = args.scratch + part * args.scratch_step
        spread(args, table, tile)
        ring, row = table + 48 * tile, width * channels
        rows, columns, current, done = side(height), side(width), -1, 0
        units = args.images * rows
        for unit in range(cut(units, parts, part), cut(units, parts, part + 1)):
            image, i = unit // rows, unit % rows
            first, stop = span(i, height)
            done = max(first, done if image == current else 0)
            current = image
            for r in range(done, stop):
                here = (image * height + r) * row * size
                line = ring + r % size_of_ring * (4 * row + 64)
                run(x + here, res + here, 0, line, row, table, tile, False)
            done = stop
            out, at = args.out, unit * columns * channels
            pool_row(ring, 4 * row + 64, out, codes, at, i, height, width, channels)

    return windowed
