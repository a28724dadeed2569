"""Channels-last tensors, and (N, C), backward. Tiles and tables are those of ``rows``.

Maths: see ``gammabeta.kernels``. Memory moved, in units of x: reduce reads 2 (1¼ with pooling, 1 more with a
residual); apply reads the same and writes 1 (1 more where the residual wants its gradient). The activation's
derivative is taken again from x.
"""

from .arguments import (
    CHANNELS,
    DRESIDUAL,
    DX,
    GRAD,
    HEIGHT,
    IMAGE_PARTS,
    IMAGES,
    RESIDUAL,
    SCRATCH,
    SCRATCH_STEP,
    TILE,
    WIDTH,
    X,
)
from .simd import float32, float64, fma, get_i64, inlined, splat, widen
from .tables import clear, cut, fold, spread, spread_means

_load, _store = float32.load, float32.store
_load_some, _store_some = float32.load_some, float32.store_some
_load_wide, _store_wide = float64.load, float64.store


def _gradients(storage, activation, residual, pool):
    """``dz`` for whole vectors and for ``count`` lanes; a pooled gradient comes spread, as a float32 line."""
    load, load_some = storage.load, storage.load_some
    grad_load, grad_load_some = (_load, _load_some) if pool else (load, load_some)
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

    return dz, dz_some


def _spread_gradient(storage):
    """The pooled gradient of one row of pixels: a quarter to each of a pair, zero for an odd last one."""
    load, load_some = storage.load, storage.load_some

    @inlined
    def spread_gradient(grad, line, width, channels):
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

    return spread_gradient


# --- reduce -----------------------------------------------------------------------------------------------


def rows_reduce(storage, activation, residual, pool):
    """Σdz and Σdz·(x - mean) of each part: float32 over some tens of tiles, float64 over those."""
    load, load_some, size = storage.load, storage.load_some, storage.size
    dz, dz_some = _gradients(storage, activation, residual, pool)
    spread_gradient = _spread_gradient(storage)

    @inlined
    def add_some(x, res, grad, at, v, count, table, tile):
        centred = load_some(x, at + v, count) - _load(table, v)
        g = dz_some(centred, res, grad, at + v, count, _load(table, tile + v), _load(table, 2 * tile + v))
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
    def run(x, res, grad, elements, table, tile, pending):
        """Add ``elements`` to the tables; ``pending`` tiles are in them since they were last flushed."""
        at = 0
        while at + 4 * tile <= elements:
            for v in range(0, tile, 16):
                m, s, b = _load(table, v), _load(table, tile + v), _load(table, 2 * tile + v)
                c0 = load(x, at + v) - m
                c1 = load(x, at + tile + v) - m
                c2 = load(x, at + 2 * tile + v) - m
                c3 = load(x, at + 3 * tile + v) - m
                g0 = dz(c0, res, grad, at + v, s, b)
                g1 = dz(c1, res, grad, at + tile + v, s, b)
                g2 = dz(c2, res, grad, at + 2 * tile + v, s, b)
                g3 = dz(c3, res, grad, at + 3 * tile + v, s, b)
                total = (g0 + g1) + (g2 + g3)
                product = fma(g0, c0, g1 * c1) + fma(g2, c2, g3 * c3)
                _store(table, 5 * tile + v, _load(table, 5 * tile + v) + total)
                _store(table, 6 * tile + v, _load(table, 6 * tile + v) + product)
            at += 4 * tile
            pending += 4
            if pending >= 128:
                flush(table, tile)
                pending = 0
        while at < elements:
            for v in range(0, min(tile, elements - at), 16):
                add_some(x, res, grad, at, v, min(16, elements - at - v), table, tile)
            at += tile
            pending += 1
        if pending >= 128:
            flush(table, tile)
            pending = 0
        return pending

    def kernel(args, part):
        channels, tile, parts = get_i64(args, CHANNELS), get_i64(args, TILE), get_i64(args, IMAGE_PARTS)
        images, height, width = get_i64(args, IMAGES), get_i64(args, HEIGHT), get_i64(args, WIDTH)
        x, res, grad = get_i64(args, X), get_i64(args, RESIDUAL), get_i64(args, GRAD)
        table = get_i64(args, SCRATCH) + part * get_i64(args, SCRATCH_STEP)
        spread(args, table, tile)
        clear(table + 20 * tile, 2 * tile)
        clear(table + 32 * tile, 4 * tile)
        if pool:
            line = table + 48 * tile
            units, row_elements, pending = images * (height // 2), width * channels, 0
            for unit in range(cut(units, parts, part), cut(units, parts, part + 1)):
                image, row = unit // (height // 2), unit % (height // 2)
                spread_gradient(grad + unit * (width // 2) * channels * size, line, width, channels)
                first = (image * height + 2 * row) * row_elements * size
                for which in range(2):
                    here = first + which * row_elements * size
                    pending = run(x + here, res + here, line, row_elements, table, tile, pending)
        else:
            elements = images * height * width * channels
            tiles = (elements + tile - 1) // tile
            start = cut(tiles, parts, part) * tile
            count = min(cut(tiles, parts, part + 1) * tile, elements) - start
            first = start * size
            run(x + first, res + first, grad + first, count, table, tile, 0)
        flush(table, tile)
        fold(args, part, table + 32 * tile, tile)

    return kernel


# --- apply ------------------------------------------------------------------------------------------------


def rows_apply(storage, activation, residual, pool):
    """``dx = scale * (dz - mean_dz - xhat * mean_dz_xhat)``, and ``dz`` where the residual wants it."""
    load, load_some, store, store_some = storage.load, storage.load_some, storage.store, storage.store_some
    size = storage.size
    dz, dz_some = _gradients(storage, activation, residual, pool)
    spread_gradient = _spread_gradient(storage)

    @inlined
    def put(x, res, grad, dx, dres, at, m, s, b, a, k):
        centred = load(x, at) - m
        g = dz(centred, res, grad, at, s, b)
        store(dx, at, fma(g, s, splat(0.0) - fma(centred, k, a)))
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
    def run(x, res, grad, dx, dres, elements, table, tile):
        at = 0
        while at + 4 * tile <= elements:
            for v in range(0, tile, 16):
                m, s, b = _load(table, v), _load(table, tile + v), _load(table, 2 * tile + v)
                a, k = _load(table, 3 * tile + v), _load(table, 4 * tile + v)
                put(x, res, grad, dx, dres, at + v, m, s, b, a, k)
                put(x, res, grad, dx, dres, at + tile + v, m, s, b, a, k)
                put(x, res, grad, dx, dres, at + 2 * tile + v, m, s, b, a, k)
                put(x, res, grad, dx, dres, at + 3 * tile + v, m, s, b, a, k)
            at += 4 * tile
        while at < elements:
            for v in range(0, min(tile, elements - at), 16):
                put_some(x, res, grad, dx, dres, at, v, min(16, elements - at - v), table, tile)
            at += tile

    def kernel(args, part):
        channels, tile, parts = get_i64(args, CHANNELS), get_i64(args, TILE), get_i64(args, IMAGE_PARTS)
        images, height, width = get_i64(args, IMAGES), get_i64(args, HEIGHT), get_i64(args, WIDTH)
        x, res, grad = get_i64(args, X), get_i64(args, RESIDUAL), get_i64(args, GRAD)
        dx, dres = get_i64(args, DX), get_i64(args, DRESIDUAL)
        table = get_i64(args, SCRATCH) + part * get_i64(args, SCRATCH_STEP)
        spread(args, table, tile)
        spread_means(args, table, tile)
        if pool:
            line = table + 48 * tile
            row_elements, pairs = width * channels, (height + 1) // 2
            units = images * pairs
            for unit in range(cut(units, parts, part), cut(units, parts, part + 1)):
                image, row = unit // pairs, unit % pairs
                rows = min(2, height - 2 * row)
                if rows == 2:
                    pooled = (image * (height // 2) + row) * (width // 2)
                    spread_gradient(grad + pooled * channels * size, line, width, channels)
                else:
                    for v in range(0, row_elements, 16):
                        _store_some(line, v, splat(0.0), min(16, row_elements - v))
                for which in range(rows):
                    here = (image * height + 2 * row + which) * row_elements * size
                    there = dres + here if dres != 0 else 0
                    run(x + here, res + here, line, dx + here, there, row_elements, table, tile)
        else:
            elements = images * height * width * channels
            tiles = (elements + tile - 1) // tile
            start = cut(tiles, parts, part) * tile
            count = min(cut(tiles, parts, part + 1) * tile, elements) - start
            first = start * size
            there = dres + first if dres != 0 else 0
            run(x + first, res + first, grad + first, dx + first, there, count, table, tile)

    return kernel
