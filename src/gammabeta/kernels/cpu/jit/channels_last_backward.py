"""Channels-last tensors, and (N, C), backward. Tiles and tables are those of ``rows``.

Maths: see ``gammabeta.kernels``. Memory moved, in units of x: reduce reads 2 (1¼ with pooling, 1 more with a
residual) and writes 1 where the residual wants its gradient, which is dz; apply reads 2 and writes 1. The
activation's derivative is taken again from x.
"""

from ..arguments import Arguments
from .channels_last import TOGETHER, ahead
from .loads import fence, float32, float64, prefetch, prefetch_write
from .max_pool import spread_row_of, window_of
from .record import takes
from .simd import fma, inlined, splat, widen
from .tables import clear, cut, fold, spread, spread_means

_load, _store = float32.load, float32.store
_load_some, _store_some = float32.load_some, float32.store_some
_load_wide, _store_wide = float64.load, float64.store


def _gradients(storage, activation, residual, pool):
    """``dz`` for whole vectors and for ``count`` lanes, and what to fetch for it.

    A pooled gradient comes spread, as a float32 line, which is near already.
    """
    lined, load, load_some = bool(pool), storage.load, storage.load_some
    grad_load, grad_load_some = (_load, _load_some) if lined else (load, load_some)
    activation_backward = activation.backward

    @inlined
    def dz(centred, res, grad, at, scale, bias):
        z = fma(centred, scale, bias)
        if residual:
            z = z + load(res, at)
        return activation_backward(z, grad_load(grad, at))

    @inlined
    def dz_some(centred, res, grad, at, count, scale, bias):
        z = fma(centred, scale, bias)
        if residual:
            z = z + load_some(res, at, count)
        return activation_backward(z, grad_load_some(grad, at, count))

    @inlined
    def fetch(x, res, grad):
        prefetch(x)
        if residual:
            prefetch(res)
        if not lined:
            prefetch(grad)

    return dz, dz_some, fetch


def _spread_of(storage, pool):
    """``(rows, fill)``: a line of float32 gradients serves so many rows of pixels, and how it is filled."""
    window = window_of(pool)
    if window is None:
        return 2, _spread_pair(storage)
    spread_row = spread_row_of(storage, window)

    @inlined
    def fill(args, grad, line, image, row, height, width, channels):
        spread_row(args, grad, line, image, row, height, width, channels)
        return 1

    return 1, fill


def _spread_pair(storage):
    """The gradient of two rows of pixels from that of the row pooled from them, as a float32 line."""
    load, load_some, size = storage.load, storage.load_some, storage.size

    @inlined
    def spread_gradient(grad, line, width, channels):
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
            for v in range(0, channels, 16):
                _store_some(line, (width - 1) * channels + v, splat(0.0), min(16, channels - v))

    @inlined
    def spread_pair(args, grad, line, image, row, height, width, channels):
        """Fill the line and return how many rows it is for: an odd last row was not pooled at all."""
        if 2 * row + 1 == height:
            for v in range(0, width * channels, 16):
                _store_some(line, v, splat(0.0), min(16, width * channels - v))
            return 1
        pooled = (image * (height // 2) + row) * (width // 2) * channels
        spread_gradient(grad + pooled * size, line, width, channels)
        return 2

    return spread_pair


# --- reduce -----------------------------------------------------------------------------------------------


@takes(Arguments)
def rows_reduce(storage, activation, residual, pool):
    """Σdz and Σdz·(x - mean) of each part: float32 over some tens of tiles, float64 over those.

    Where the residual wants its gradient dz is written too, for the residual and for the second pass.
    """
    load, load_some, size = storage.load, storage.load_some, storage.size
    store, store_some = storage.store, storage.store_some
    dz, dz_some, fetch = _gradients(storage, activation, residual, pool)
    lined, (most, fill) = bool(pool), _spread_of(storage, pool)

    @inlined
    def add(x, res, grad, dres, at, v, table, tile):
        centred = load(x, at + v) - _load(table, v)
        g = dz(centred, res, grad, at + v, _load(table, tile + v), _load(table, 2 * tile + v))
        if residual and dres != 0:
            store(dres, at + v, g)
        _store(table, 5 * tile + v, _load(table, 5 * tile + v) + g)
        _store(table, 6 * tile + v, fma(g, centred, _load(table, 6 * tile + v)))

    @inlined
    def add_some(x, res, grad, dres, at, v, count, table, tile):
        centred = load_some(x, at + v, count) - _load(table, v)
        g = dz_some(centred, res, grad, at + v, count, _load(table, tile + v), _load(table, 2 * tile + v))
        if residual and dres != 0:
            store_some(dres, at + v, g, count)
        _store_some(table, 5 * tile + v, _load(table, 5 * tile + v) + g, count)
        _store_some(table, 6 * tile + v, fma(g, centred, _load(table, 6 * tile + v)), count)

    @inlined
    def flush(table, tile):
        for v in range(0, 2 * tile, 16):
            _store_wide(
                table + 32 * tile,
                v,
                _load_wide(table + 32 * tile, v) + widen(_load(table, 5 * tile + v)),
            )
            _store(table, 5 * tile + v, splat(0.0))

    @inlined
    def run(x, res, grad, dres, elements, table, tile, pending):
        """Add ``elements`` to the tables; ``pending`` tiles are in them since they were last flushed."""
        at = 0
        while at + TOGETHER * tile <= elements:
            for v in range(0, tile, 16):
                m, s, b = _load(table, v), _load(table, tile + v), _load(table, 2 * tile + v)
                total, product = splat(0.0), splat(0.0)
                for j in range(TOGETHER):
                    line = ahead(at, v, tile, TOGETHER, j, size)
                    fetch(x + line, res + line, grad + line)
                    here = at + j * tile + v
                    centred = load(x, here) - m
                    g = dz(centred, res, grad, here, s, b)
                    if residual and dres != 0:
                        prefetch_write(dres + line)
                        store(dres, here, g)
                    total = total + g
                    product = fma(g, centred, product)
                _store(table, 5 * tile + v, _load(table, 5 * tile + v) + total)
                _store(table, 6 * tile + v, _load(table, 6 * tile + v) + product)
            at += TOGETHER * tile
            pending += TOGETHER
            if pending >= 128:
                flush(table, tile)
                pending = 0
        while at < elements:
            for v in range(0, min(tile, elements - at), 16):
                count = elements - at - v
                if count >= 16:
                    add(x, res, grad, dres, at, v, table, tile)
                else:
                    add_some(x, res, grad, dres, at, v, count, table, tile)
            at += tile
            pending += 1
        if pending >= 128:
            flush(table, tile)
            pending = 0
        return pending

    def kernel(args, part):
        channels, tile, parts = args.channels, args.tile, args.image_parts
        images, height, width = args.images, args.height, args.width
        x, res, grad = args.x, args.residual, args.grad
        dres = args.dresidual
        table = args.scratch + part * args.scratch_step
        spread(args, table, tile)
        clear(table + 20 * tile, 2 * tile)
        clear(table + 32 * tile, 4 * tile)
        if lined:
            line = table + 48 * tile
            row_elements, lines, pending = width * channels, (height + most - 1) // most, 0
            units = images * lines
            for unit in range(cut(units, parts, part), cut(units, parts, part + 1)):
                image, row = unit // lines, unit % lines
                rows = fill(args, grad, line, image, row, height, width, channels)
                for which in range(rows):
                    here = (image * height + most * row + which) * row_elements * size
                    there = dres + here if dres != 0 else 0
                    pending = run(x + here, res + here, line, there, row_elements, table, tile, pending)
        else:
            elements = images * height * width * channels
            tiles = (elements + tile - 1) // tile
            start = cut(tiles, parts, part) * tile
            count = min(cut(tiles, parts, part + 1) * tile, elements) - start
            first = start * size
            there = dres + first if dres != 0 else 0
            run(x + first, res + first, grad + first, there, count, table, tile, 0)
        flush(table, tile)
        fold(args, part, table + 32 * tile, tile)

    return kernel


# --- apply ------------------------------------------------------------------------------------------------


@takes(Arguments)
def rows_apply(storage, activation, residual, pool):
    """``dx = scale * (dz - mean_dz - xhat * mean_dz_xhat)``, and ``dz`` where the residual wants it."""
    load, load_some, store, store_some = storage.load, storage.load_some, storage.store, storage.store_some
    size, stream = storage.size, storage.stream
    dz, dz_some, fetch = _gradients(storage, activation, residual, pool)
    lined, (most, fill) = bool(pool), _spread_of(storage, pool)

    @inlined
    def put(x, res, grad, dx, dres, at, m, s, b, a, k, streamed):
        centred = load(x, at) - m
        g = dz(centred, res, grad, at, s, b)
        y = fma(g, s, splat(0.0) - fma(centred, k, a))
        if streamed:
            stream(dx, at, y)
        else:
            store(dx, at, y)
        if residual and dres != 0:
            store(dres, at, g)

    @inlined
    def put_some(x, res, grad, dx, dres, at, v, count, table, tile):
        s = _load(table, tile + v)
        centred = load_some(x, at + v, count) - _load(table, v)
        g = dz_some(centred, res, grad, at + v, count, s, _load(table, 2 * tile + v))
        less = fma(centred, _load(table, 4 * tile + v), _load(table, 3 * tile + v))
        store_some(dx, at + v, fma(g, s, splat(0.0) - less), count)
        if residual and dres != 0:
            store_some(dres, at + v, g, count)

    @inlined
    def run(x, res, grad, dx, dres, elements, table, tile, streamed):
        at = 0
        while at + TOGETHER * tile <= elements:
            for v in range(0, tile, 16):
                m, s, b = _load(table, v), _load(table, tile + v), _load(table, 2 * tile + v)
                a, k = _load(table, 3 * tile + v), _load(table, 4 * tile + v)
                for j in range(TOGETHER):
                    line = ahead(at, v, tile, TOGETHER, j, size)
                    fetch(x + line, res + line, grad + line)
                    if not streamed:
                        prefetch_write(dx + line)
                    put(x, res, grad, dx, dres, at + j * tile + v, m, s, b, a, k, streamed)
            at += TOGETHER * tile
        while at < elements:
            for v in range(0, min(tile, elements - at), 16):
                count = elements - at - v
                if count >= 16:
                    m, s, b = _load(table, v), _load(table, tile + v), _load(table, 2 * tile + v)
                    a, k = _load(table, 3 * tile + v), _load(table, 4 * tile + v)
                    put(x, res, grad, dx, dres, at + v, m, s, b, a, k, False)
                else:
                    put_some(x, res, grad, dx, dres, at, v, count, table, tile)
            at += tile

    def kernel(args, part):
        channels, tile, parts = args.channels, args.tile, args.image_parts
        images, height, width = args.images, args.height, args.width
        x, res, grad = args.x, args.residual, args.grad
        dx, dres, streamed = args.dx, args.dresidual, args.stream != 0
        table = args.scratch + part * args.scratch_step
        spread(args, table, tile)
        spread_means(args, table, tile)
        if lined:
            line = table + 48 * tile
            row_elements, lines = width * channels, (height + most - 1) // most
            units = images * lines
            for unit in range(cut(units, parts, part), cut(units, parts, part + 1)):
                image, row = unit // lines, unit % lines
                rows = fill(args, grad, line, image, row, height, width, channels)
                for which in range(rows):
                    here = (image * height + most * row + which) * row_elements * size
                    there = dres + here if dres != 0 else 0
                    run(x + here, res + here, line, dx + here, there, row_elements, table, tile, streamed)
        else:
            elements = images * height * width * channels
            tiles = (elements + tile - 1) // tile
            start = cut(tiles, parts, part) * tile
            count = min(cut(tiles, parts, part + 1) * tile, elements) - start
            first = start * size
            there = dres + first if dres != 0 else 0
            run(x + first, res + first, grad + first, dx + first, there, count, table, tile, streamed)
        if streamed:
            fence()

    return kernel
