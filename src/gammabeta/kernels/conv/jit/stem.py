"""A network's first convolution with the batch normalization behind it: statistics, weights, gradients.

What such a convolution gives is large, and a patch of what it reads is small: it is cheaper to convolve anew
than to read. So its output is never written. Its statistics follow from those of the patches: with their
mean p and covariance S, an output channel of weight w has mean w·p and variance w'Sw. The backward pass needs
the sums over all pixels of dz and of dz times the patch, and from these all gradients follow (``kernels.
conv.stem`` has the mathematics). The forward pass, with the normalisation in the weights, is that of
``serving``.
"""

import math

from ...cpu.jit.loads import float32, float64, get_f32, get_f64, get_i64, put_f32, put_f64, put_i64
from ...cpu.jit.record import takes
from ...cpu.jit.simd import fma, inlined, splat, total, widen
from ...cpu.jit.tables import clear, cut
from ..arguments import ROWS, StemArguments
from .products import Patches, Rows, tile_of

_load, _store, _load_some = float32.load, float32.store, float32.load_some
_load_wide, _store_wide = float64.load, float64.store


@inlined
def _patch_size(args):
    """The number of values in a patch."""
    return args.channels * args.kernel_height * args.kernel_width


@inlined
def _output_size(args):
    """Height and width of what the convolution gives."""
    height = args.height - args.kernel_height + 1
    return height, args.width - args.kernel_width + 1


@inlined
def _place_of(args, k):
    """How far value k of a patch lies from its first one in the image, in values."""
    kernel_height, kernel_width = args.kernel_height, args.kernel_width
    channel, within = k // (kernel_height * kernel_width), k % (kernel_height * kernel_width)
    row = channel * args.height + within // kernel_width
    return row * args.width + within % kernel_width


# --- the statistics -------------------------------------------------------------------------------------


@takes(StemArguments)
def stem_moments(storage, activation, residual, pool):
    """Sums of patches and of products of their values, about the first image's first pixel.

    A window is the value at one place of every patch. Products are of three windows by three.
    """

    @inlined
    def copy(args, image, sheet):
        """The image less its channels' shifts."""
        plane = args.height * args.width
        first = args.x
        source = first + 4 * image * args.channels * plane
        for channel in range(args.channels):
            shift, at = splat(get_f32(first, channel * plane)), channel * plane
            for i in range(0, plane - 15, 16):
                _store(sheet, at + i, _load(source, at + i) - shift)
            last = plane - plane % 16  # what is written behind it is written again, or not read
            _store(sheet, at + last, _load_some(source, at + last, plane - last) - shift)

    @inlined
    def window(source, line, target, height, width, pitch):
        """Copy a window in rows of whole vectors, zeros at their ends; return its sum."""
        added, full = splat(0.0), width - width % 16
        for y in range(height):
            for x in range(0, full, 16):
                value = _load(source, y * line + x)
                _store(target, y * pitch + x, value)
                added = added + value
            if full < width:
                value = _load_some(source, y * line + full, width - full)
                _store(target, y * pitch + full, value)
                added = added + value
        return total(added)

    @inlined
    def products(args, seen, sheet, places, pitch, sums, row):
        """Add to a square of nine ``sums`` those of the products of three copied windows by three."""
        (height, _), line, zero = _output_size(args), args.width, splat(0.0)
        step = height * pitch
        a0, a1, a2, b0, b1, b2, c0, c1, c2 = zero, zero, zero, zero, zero, zero, zero, zero, zero
        p0, p1 = sheet + get_i64(places, 0), sheet + get_i64(places, 1)
        p2 = sheet + get_i64(places, 2)
        for y in range(height):
            for x in range(0, pitch, 16):
                here, at = y * pitch + x, y * line + x
                u, v, w = _load(seen, here), _load(seen, step + here), _load(seen, 2 * step + here)
                p, q, r = _load(p0, at), _load(p1, at), _load(p2, at)
                a0, a1, a2 = fma(u, p, a0), fma(u, q, a1), fma(u, r, a2)
                b0, b1, b2 = fma(v, p, b0), fma(v, q, b1), fma(v, r, b2)
                c0, c1, c2 = fma(w, p, c0), fma(w, q, c1), fma(w, r, c2)
        add(sums, 0, a0, a1, a2)
        add(sums, row, b0, b1, b2)
        add(sums, 2 * row, c0, c1, c2)

    @inlined
    def add(sums, at, a, b, c):
        put_f64(sums, at, get_f64(sums, at) + total(a))
        put_f64(sums, at + 1, get_f64(sums, at + 1) + total(b))
        put_f64(sums, at + 2, get_f64(sums, at + 2) + total(c))

    def kernel(args, part):
        patch, line = _patch_size(args), args.width
        height, width = _output_size(args)
        pitch = (width + 15) // 16 * 16
        values = args.channels * args.height * line
        padded = (patch + 2) // 3 * 3  # the last windows stand twice where they do not fill a triple
        sums = args.sums + 8 * part * padded * (padded + 1)
        sheet = args.scratch + part * args.scratch_step
        seen = sheet + 4 * ((values + 47) // 16 * 16)
        places = seen + 4 * padded * height * pitch
        for i in range(padded * (padded + 1)):
            put_f64(sums, i, 0.0)
        for k in range(padded):
            put_i64(places, k, 4 * _place_of(args, min(k, patch - 1)))
        clear(sheet + 4 * (values - values % 16), 32)  # read beyond the last row, and multiplied by 0
        images, parts = args.images, args.parts
        for image in range(cut(images, parts, part), cut(images, parts, part + 1)):
            copy(args, image, sheet)
            for k in range(padded):
                target = seen + 4 * k * height * pitch
                added = window(sheet + get_i64(places, k), line, target, height, width, pitch)
                put_f64(sums, k, get_f64(sums, k) + added)
            for k in range(0, padded, 3):
                for other in range(k, padded, 3):
                    first, square = seen + 4 * k * height * pitch, sums + 8 * (padded * (k + 1) + other)
                    products(args, first, sheet, places + 8 * other, pitch, square, padded)

    return kernel


@takes(StemArguments)
def finish_stem_statistics(storage, activation, residual, pool):
    """Mean and covariance of the patches; mean, biased variance and invstd of each output channel."""

    def kernel(args, part):
        patch, parts, sums = _patch_size(args), args.parts, args.sums
        height, width = _output_size(args)
        count = args.images * height * width
        rows = (patch + 2) // 3 * 3
        step = rows * (rows + 1)
        plane = args.height * args.width
        size = args.kernel_height * args.kernel_width
        means, projected = args.patch_mean, args.covariance
        for p in range(1, parts):
            for i in range(step):
                put_f64(sums, i, get_f64(sums, i) + get_f64(sums, p * step + i))
        for k in range(patch):
            for other in range(k, patch):
                product = get_f64(sums, k) / count * get_f64(sums, other)
                value = (get_f64(sums, (k + 1) * rows + other) - product) / count
                put_f64(sums, (k + 1) * rows + other, value)
                put_f64(sums, (other + 1) * rows + k, value)
        for k in range(patch):
            shift = get_f32(args.x, k // size * plane)
            put_f64(means, k, shift + get_f64(sums, k) / count)
        weight, eps = args.weight, args.eps
        for o in range(args.out_channels):
            mean, var = 0.0, 0.0
            for k in range(patch):
                value = 0.0
                for other in range(patch):
                    value += get_f64(sums, (k + 1) * rows + other) * get_f32(weight, o * patch + other)
                put_f64(projected, o * patch + k, value)
                mean += get_f64(means, k) * get_f32(weight, o * patch + k)
                var += value * get_f32(weight, o * patch + k)
            if var < 0.0:
                var = 0.0
            put_f32(args.mean, o, mean)
            put_f32(args.var, o, var)
            put_f32(args.invstd, o, 1.0 / math.sqrt(var + eps))

    return kernel


# --- forward: the weights -------------------------------------------------------------------------------


@takes(StemArguments)
def stem_weights(storage, activation, residual, pool, vectors):
    """``w γ invstd``, a row of channels for each value of a patch, and a last row: β less the mean."""
    lanes = 16 * vectors

    def kernel(args, part):
        patch, scaled = _patch_size(args), args.scaled
        clear(scaled, (patch + 1) * lanes)
        for o in range(args.out_channels):
            scale = get_f32(args.invstd, o)
            if args.gamma != 0:
                scale *= get_f32(args.gamma, o)
            rest = 0.0
            if args.beta != 0:
                rest = get_f32(args.beta, o)
            if args.patch_mean == 0:
                rest -= scale * get_f32(args.mean, o)
            for k in range(patch):
                put_f32(scaled, k * lanes + o, scale * get_f32(args.weight, o * patch + k))
                if args.patch_mean != 0:
                    rest -= get_f32(scaled, k * lanes + o) * get_f64(args.patch_mean, k)
            put_f32(scaled, patch * lanes + o, rest)

    return kernel


# --- backward -------------------------------------------------------------------------------------------


@takes(StemArguments)
def stem_reduce(storage, activation, residual, pool, vectors):
    """Sums over the pixels of each part: dz times the patch, and after them dz."""
    rows, lanes = ROWS[vectors - 1], 16 * vectors
    tile = tile_of(rows, vectors)
    load_some, size, act = storage.load_some, storage.size, activation.backward
    each = 2 if pool else 1  # rows and columns of z that one of the output takes

    @inlined
    def convolved(args, source, pixels, taps, z, width):
        """Z of a row of pixels; the last tile may take some pixels again."""
        patch = _patch_size(args)
        constants = Rows(args.scaled + 4 * lanes * patch, 0)
        for pixel in range(0, width, rows):
            first = min(pixel, width - rows)
            patches = Patches(source + 4 * first, pixels, taps, patch)
            tile(patches, args.scaled, constants, Rows(z + 4 * lanes * first, 4 * lanes))

    @inlined
    def differentiated(line, pitch, grad, pixel, v):
        """Put dz in the place of z; its sum over the pixels taken together."""
        if not pool:
            dz = act(_load(line, pixel * lanes + v), grad)
            _store(line, pixel * lanes + v, dz)
            return dz
        left, right, g = 2 * pixel * lanes + v, (2 * pixel + 1) * lanes + v, grad * splat(0.25)
        a, b = act(_load(line, left), g), act(_load(line, right), g)
        c, d = act(_load(line, pitch + left), g), act(_load(line, pitch + right), g)
        _store(line, left, a)
        _store(line, right, b)
        _store(line, pitch + left, c)
        _store(line, pitch + right, d)
        return (a + b) + (c + d)

    @inlined
    def flush(table, sums, count):
        """Add the image's sums to the part's."""
        for i in range(0, count, 16):
            _store_wide(sums, i, _load_wide(sums, i) + widen(_load(table, i)))
            _store(table, i, splat(0.0))

    def kernel(args, part):
        patch, outs = _patch_size(args), args.out_channels
        line, plane = args.width, args.height * args.width
        height, width = _output_size(args)
        height, width = height // each, width // each
        padded = (patch + rows - 1) // rows * rows  # the rows beyond the patch are not read
        pitch = each * width * lanes
        table = args.scratch + part * args.scratch_step
        z = table + 4 * lanes * (padded + 1)
        taps = z + 4 * each * pitch
        pixels = taps + 8 * padded
        sums = args.sums + 8 * part * lanes * (padded + 1)
        for k in range(padded):
            put_i64(taps, k, 4 * _place_of(args, min(k, patch - 1)))
        for i in range(each * width):
            put_i64(pixels, i, 4 * i)
        clear(table, lanes * (padded + 1))
        for i in range(lanes * (padded + 1)):
            put_f64(sums, i, 0.0)
        images, parts = args.images, args.parts
        for image in range(cut(images, parts, part), cut(images, parts, part + 1)):
            source = args.x + 4 * image * args.channels * plane
            for y in range(height):
                for i in range(each):
                    row = source + 4 * (each * y + i) * line
                    convolved(args, row, pixels, taps, z + 4 * i * pitch, each * width)
                grad = args.grad + (image * height + y) * width * outs * size
                for v in range(0, lanes, 16):
                    some, added = min(16, outs - v), splat(0.0)
                    for pixel in range(width):
                        g = load_some(grad, pixel * outs + v, some)
                        added = added + differentiated(z, pitch, g, pixel, v)
                    last = padded * lanes + v
                    _store(table, last, _load(table, last) + added)
                for i in range(each):
                    row = source + 4 * (each * y + i) * line
                    for k in range(0, padded, rows):
                        patches = Patches(row, taps + 8 * k, pixels, each * width)
                        sums_of_k = Rows(table + 4 * lanes * k, 4 * lanes)
                        tile(patches, z + 4 * i * pitch, sums_of_k, sums_of_k)
            flush(table, sums, lanes * (padded + 1))

    return kernel


@takes(StemArguments)
def finish_stem_gradients(storage, activation, residual, pool, vectors):
    """The gradients of γ, β and the convolution's weight."""
    rows, lanes = ROWS[vectors - 1], 16 * vectors

    def kernel(args, part):
        patch, parts, sums = _patch_size(args), args.parts, args.sums
        padded = (patch + rows - 1) // rows * rows
        step = lanes * (padded + 1)
        for p in range(1, parts):
            for i in range(step):
                put_f64(sums, i, get_f64(sums, i) + get_f64(sums, p * step + i))
        for o in range(args.out_channels):
            invstd, dbeta, dgamma = get_f32(args.invstd, o), get_f64(sums, padded * lanes + o), 0.0
            for k in range(patch):
                centred = get_f64(sums, k * lanes + o) - get_f64(args.patch_mean, k) * dbeta
                put_f64(sums, k * lanes + o, centred)
                dgamma += invstd * centred * get_f32(args.weight, o * patch + k)
            scale = invstd
            if args.gamma != 0:
                scale = invstd * get_f32(args.gamma, o)
            for k in range(patch):
                back = dgamma * invstd * get_f64(args.covariance, o * patch + k)
                put_f32(args.dweight, o * patch + k, scale * (get_f64(sums, k * lanes + o) - back))
            put_f32(args.dbeta, o, dbeta)
            put_f32(args.dgamma, o, dgamma)

    return kernel
