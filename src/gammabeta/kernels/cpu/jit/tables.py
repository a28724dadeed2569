"""Working memory: where a part's begins, and tables of parameters in it for channels_last kernels.

A *tile* is a whole number of pixels and of vectors; within it element l belongs to channel l % C. A table
holds a float32 for each element of a tile, so that vectors meet their parameters: table 0 is the mean, 1 the
scale (weight * invstd), 2 the bias, 7 the leak, and for ``dx`` 3 and 4 are ``constant`` and ``slope``
(``pointwise``).
"""

from .loads import float32, float64, get_f32, get_f64, put_f32, put_f64
from .pointwise import Affine, AffineBackward, leak_of, scale_and_bias
from .simd import inlined, splat

LINE = 48  # bytes of tables for an element of a tile; behind them kernels with pooling have a line or a ring

_load, _store, _load_wide = float32.load, float32.store, float64.load


# --- how the work is cut ----------------------------------------------------------------------------------


@inlined
def cut(units, parts, part):
    """The first unit of a part; its end is the first of the next."""
    return units * part // parts


@inlined
def step_of(number):
    """``number`` as the step of a ``range``; LLVM sees that it is not 0, so that nothing can raise."""
    return max(1, number)


@inlined
def own_elements(args, part):
    """The first element of a part and the one behind its last: whole tiles, but for the tensor's last."""
    elements = args.images * args.height * args.width * args.channels
    tiles = (elements + args.tile - 1) // args.tile
    start = cut(tiles, args.image_parts, part) * args.tile
    return start, min(cut(tiles, args.image_parts, part + 1) * args.tile, elements)


# --- working memory ---------------------------------------------------------------------------------------


@inlined
def memory(args, part):
    """Where the working memory of a part begins."""
    return args.scratch + part * args.scratch_step


@inlined
def fill(address, count, value):
    """Write ``value`` to ``count`` float32, rounded up to a multiple of sixteen."""
    for i in range(0, count, 16):
        _store(address, i, splat(value))


@inlined
def clear(address, count):
    """Write ``count`` (a multiple of sixteen) float32 zeros."""
    fill(address, count, 0.0)


# --- tables -----------------------------------------------------------------------------------------------


@inlined
def spread(args, table):
    """Fill the tables of mean, scale, bias and leak."""
    tile = args.tile
    for row in range(0, tile, step_of(args.channels)):
        for c in range(args.channels):
            scale, bias = scale_and_bias(args, c)
            put_f32(table, row + c, get_f32(args.mean, c))
            put_f32(table, tile + row + c, scale)
            put_f32(table, 2 * tile + row + c, bias)
            put_f32(table, 7 * tile + row + c, leak_of(args, c))


@inlined
def spread_means(args, table):
    """Fill the tables of constant and slope."""
    tile = args.tile
    for row in range(0, tile, step_of(args.channels)):
        for c in range(args.channels):
            scale = get_f32(table, tile + row + c)
            slope = scale * get_f32(args.invstd, c) * get_f32(args.mean_dz_xhat, c)
            put_f32(table, 3 * tile + row + c, scale * get_f32(args.mean_dz, c))
            put_f32(table, 4 * tile + row + c, slope)


@inlined
def affine_at(table, tile, v):
    """The parameters of the sixteen elements from ``v`` on."""
    mean, scale, bias = _load(table, v), _load(table, tile + v), _load(table, 2 * tile + v)
    return Affine(mean, scale, bias, _load(table, 7 * tile + v))


@inlined
def affine_backward_at(table, tile, v):
    """The same, with what ``dx`` needs."""
    mean, scale, bias, leak = affine_at(table, tile, v)
    return AffineBackward(mean, scale, bias, leak, _load(table, 3 * tile + v), _load(table, 4 * tile + v))


@inlined
def sum_tables(args, part, wide):
    """Add two float64 tables up into the part's two sums for each channel."""
    channels, tile = args.channels, args.tile
    for which in range(2):
        target = (2 * part + which) * channels
        source = which * tile
        for c in range(channels):
            put_f64(args.sums, target + c, 0.0)
        for row in range(0, tile, step_of(channels)):
            for c in range(channels):
                added = get_f64(args.sums, target + c) + get_f64(wide, source + row + c)
                put_f64(args.sums, target + c, added)
