"""Tables for channels_last kernels: one value per element of a tile, so that vectors meet their parameters.

A tile is a whole number of pixels and of vectors; within it element l belongs to channel l % C. Each part of
the work has tables of its own.
"""

from .loads import float32, float64, get_f32, get_f64, put_f32, put_f64
from .simd import inlined, splat

_store, _load_wide = float32.store, float64.load


@inlined
def spread(args, table, tile):
    """Fill the tables mean, scale = weight * invstd and bias, a value per element of a tile."""
    channels, weight, bias = args.channels, args.weight, args.bias
    mean, invstd = args.mean, args.invstd
    for row in range(0, tile, channels):
        for c in range(channels):
            scale = get_f32(invstd, c)
            if weight != 0:
                scale *= get_f32(weight, c)
            put_f32(table, row + c, get_f32(mean, c))
            put_f32(table, tile + row + c, scale)
            put_f32(table, 2 * tile + row + c, get_f32(bias, c) if bias != 0 else 0.0)


@inlined
def spread_means(args, table, tile):
    """Fill tables 3 and 4, so that dx = scale * dz - table3 - (x - mean) * table4."""
    channels, invstd = args.channels, args.invstd
    mean_dz, mean_dz_xhat = args.mean_dz, args.mean_dz_xhat
    for row in range(0, tile, channels):
        for c in range(channels):
            scale = get_f32(table, tile + row + c)
            put_f32(table, 3 * tile + row + c, scale * get_f32(mean_dz, c))
            put_f32(table, 4 * tile + row + c, scale * get_f32(invstd, c) * get_f32(mean_dz_xhat, c))


@inlined
def clear(address, count):
    """Write ``count`` (a multiple of sixteen) float32 zeros."""
    for i in range(0, count, 16):
        _store(address, i, splat(0.0))


@inlined
def fold(args, part, wide_sums, tile):
    """Add the two float64 tables, a value per element of a tile, up into the part's sums per channel."""
    channels, sums = args.channels, args.sums
    for which in range(2):
        target = (2 * part + which) * channels
        source = which * tile
        for c in range(channels):
            put_f64(sums, target + c, 0.0)
        for row in range(0, tile, channels):
            for c in range(channels):
                added = get_f64(sums, target + c) + get_f64(wide_sums, source + row + c)
                put_f64(sums, target + c, added)


@inlined
def cut(units, parts, part):
    """The first unit of a part; its end is the first of the next."""
    return units * part // parts
