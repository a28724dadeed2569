"""A network's first convolution with the batch normalization, activation and 2x2 mean behind it, as one.

What such a convolution gives is large, and a patch of what it reads is small: it is cheaper to convolve anew
than to read. So its output is never written. Its statistics follow from those of the patches: with their
mean p and covariance S, an output channel of weight w has mean w·p and variance w'Sw. The backward pass needs
the sums over all pixels of dz and of dz times the patch, and from these all gradients follow (``gammabeta.
kernels.stem`` has the mathematics).
"""

import math

from .memory import float32, float64, get_f32, get_f64, get_i64, put_f32, put_f64, put_i64
from .products import tile_of
from .registers import ROWS
from .simd import fma, inlined, splat, total, widen
from .stem_arguments import (
    BETA,
    CHANNELS,
    COVARIANCE,
    DBETA,
    DGAMMA,
    DWEIGHT,
    EPS,
    GAMMA,
    GRAD,
    HEIGHT,
    IMAGES,
    INVSTD,
    KERNEL_HEIGHT,
    KERNEL_WIDTH,
    MEAN,
    OUT,
    OUT_CHANNELS,
    PARTS,
    PATCH,
    SCRATCH,
    SCRATCH_STEP,
    SUMS,
    VAR,
    WEIGHT,
    WIDTH,
    X,
)
from .tables import clear, cut

_load, _store = float32.load, float32.store
_load_some = float32.load_some
_load_wide, _store_wide = float64.load, float64.store


@inlined
def _patch(args):
    """The number of values in a patch."""
    return get_i64(args, CHANNELS) * get_i64(args, KERNEL_HEIGHT) * get_i64(args, KERNEL_WIDTH)


@inlined
def _output(args):
    """Height and width of what the convolution gives."""
    height = get_i64(args, HEIGHT) - get_i64(args, KERNEL_HEIGHT) + 1
    return height, get_i64(args, WIDTH) - get_i64(args, KERNEL_WIDTH) + 1


@inlined
def _place(args, k):
    """How far value k of a patch lies from its first one in the image, in values."""
    kernel_height, kernel_width = get_i64(args, KERNEL_HEIGHT), get_i64(args, KERNEL_WIDTH)
    channel, within = k // (kernel_height * kernel_width), k % (kernel_height * kernel_width)
    row = channel * get_i64(args, HEIGHT) + within // kernel_width
    return row * get_i64(args, WIDTH) + within % kernel_width


# --- statistics -------------------------------------------------------------------------------------------


def stem_moments(storage, activation, residual, pool):
    """Sums of patches and of products of their values, about the first image's first pixel.

    A window is the value at one place of every patch. Products are of three windows by three.
    """

    @inlined
    def copy(args, image, sheet):
        """The image less its channels' shifts."""
        plane = get_i64(args, HEIGHT) * get_i64(args, WIDTH)
        first = get_i64(args, X)
        source = first + 4 * image * get_i64(args, CHANNELS) * plane
        for channel in range(get_i64(args, CHANNELS)):
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
    def products(seen, step, sheet, places, height, line, pitch, sums, row):
        """Add to a square of nine ``sums`` those of the products of three copied windows by three."""
        zero = splat(0.0)
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
        patch, line = _patch(args), get_i64(args, WIDTH)
        height, width = _output(args)
        pitch = (width + 15) // 16 * 16
        values = get_i64(args, CHANNELS) * get_i64(args, HEIGHT) * line
        padded = (patch + 2) // 3 * 3  # the last windows stand twice where they do not fill a triple
        sums = get_i64(args, SUMS) + 8 * part * padded * (padded + 1)
        sheet = get_i64(args, SCRATCH) + part * get_i64(args, SCRATCH_STEP)
        seen = sheet + 4 * ((values + 47) // 16 * 16)
        places = seen + 4 * padded * height * pitch
        for i in range(padded * (padded + 1)):
            put_f64(sums, i, 0.0)
        for k in range(padded):
            put_i64(places, k, 4 * _place(args, min(k, patch - 1)))
        clear(sheet + 4 * (values - values % 16), 32)  # read beyond the last row, and multiplied by 0
        images, parts = get_i64(args, IMAGES), get_i64(args, PARTS)
        for image in range(cut(images, parts, part), cut(images, parts, part + 1)):
            copy(args, image, sheet)
            for k in range(padded):
                target = seen + 4 * k * height * pitch
                added = window(sheet + get_i64(places, k), line, target, height, width, pitch)
                put_f64(sums, k, get_f64(sums, k) + added)
            for k in range(0, padded, 3):
                for other in range(k, padded, 3):
                    first, square = seen + 4 * k * height * pitch, sums + 8 * (padded * (k + 1) + other)
                    there = places + 8 * other
                    products(first, height * pitch, sheet, there, height, line, pitch, square, padded)

    return kernel


def finish_stem_statistics(storage, activation, residual, pool):
    """Mean and covariance of the patches; mean, biased variance and invstd of each output channel."""

    def kernel(args, part):
        patch, parts, sums = _patch(args), get_i64(args, PARTS), get_i64(args, SUMS)
        height, width = _output(args)
        count = get_i64(args, IMAGES) * height * width
        rows = (patch + 2) // 3 * 3
        step = rows * (rows + 1)
        plane = get_i64(args, HEIGHT) * get_i64(args, WIDTH)
        size = get_i64(args, KERNEL_HEIGHT) * get_i64(args, KERNEL_WIDTH)
        means, projected = get_i64(args, PATCH), get_i64(args, COVARIANCE)
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
            shift = get_f32(get_i64(args, X), k // size * plane)
            put_f64(means, k, shift + get_f64(sums, k) / count)
        weight, eps = get_i64(args, WEIGHT), get_f64(args, EPS)
        for o in range(get_i64(args, OUT_CHANNELS)):
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
            put_f32(get_i64(args, MEAN), o, mean)
            put_f32(get_i64(args, VAR), o, var)
            put_f32(get_i64(args, INVSTD), o, 1.0 / math.sqrt(var + eps))

    return kernel


# --- pixels -----------------------------------------------------------------------------------------------


def _tools(pool, vectors):
    """What forward and backward share: the weights with the normalisation in them, and a row of z."""
    rows = ROWS[vectors - 1]
    lanes = 16 * vectors
    tile = tile_of(rows, vectors)

    @inlined
    def scaled(args, weights):
        """``w γ invstd``, a row of channels for each value of a patch, and a last row: β less the mean."""
        patch, outs = _patch(args), get_i64(args, OUT_CHANNELS)
        gamma, beta = get_i64(args, GAMMA), get_i64(args, BETA)
        weight, means = get_i64(args, WEIGHT), get_i64(args, PATCH)
        clear(weights, (patch + 1) * lanes)
        for o in range(outs):
            scale = get_f32(get_i64(args, INVSTD), o)
            if gamma != 0:
                scale *= get_f32(gamma, o)
            rest = 0.0
            if beta != 0:
                rest = get_f32(beta, o)
            if means == 0:
                rest -= scale * get_f32(get_i64(args, MEAN), o)
            for k in range(patch):
                put_f32(weights, k * lanes + o, scale * get_f32(weight, o * patch + k))
                if means != 0:
                    rest -= get_f32(weights, k * lanes + o) * get_f64(means, k)
            put_f32(weights, patch * lanes + o, rest)

    @inlined
    def convolved(source, pixels, places, patch, weights, target, width):
        """Z of a row of pixels; the last tile may take some pixels again."""
        start = weights + 4 * lanes * patch
        for pixel in range(0, width, rows):
            first = min(pixel, width - rows)
            tile(
                source + 4 * first,
                pixels,
                places,
                patch,
                weights,
                start,
                0,
                target + 4 * lanes * first,
                4 * lanes,
            )

    @inlined
    def steps(table, count):
        """``count`` values side by side."""
        for i in range(count):
            put_i64(table, i, 4 * i)

    @inlined
    def size(args):
        """How many rows and columns the output has, and how many of the convolution's each of them takes."""
        height, width = _output(args)
        if pool:
            return height // 2, width // 2, 2
        return height, width, 1

    return rows, lanes, tile, scaled, convolved, steps, size


def stem_forward(storage, activation, residual, pool, vectors):
    """``pool(activation(z))``, z being the convolution's output normalised."""
    _, lanes, _, scaled, convolved, steps, size = _tools(pool, vectors)
    store, store_some, bytes_each = storage.store, storage.store_some, storage.size
    act = activation.forward

    @inlined
    def finished(line, pitch, pixel, v):
        """One output value for each of sixteen channels."""
        if not pool:
            return act(_load(line, pixel * lanes + v))
        left, right = 2 * pixel * lanes + v, (2 * pixel + 1) * lanes + v
        upper = act(_load(line, left)) + act(_load(line, right))
        lower = act(_load(line, pitch + left)) + act(_load(line, pitch + right))
        return (upper + lower) * splat(0.25)

    def kernel(args, part):
        patch, outs = _patch(args), get_i64(args, OUT_CHANNELS)
        line, plane = get_i64(args, WIDTH), get_i64(args, HEIGHT) * get_i64(args, WIDTH)
        height, width, each = size(args)
        weights = get_i64(args, SCRATCH) + part * get_i64(args, SCRATCH_STEP)
        places = weights + 4 * lanes * (patch + 1)
        pixels = places + 8 * (patch + 16)
        z = pixels + 8 * each * width
        pitch = each * width * lanes
        scaled(args, weights)
        for k in range(patch):
            put_i64(places, k, 4 * _place(args, k))
        steps(pixels, each * width)
        images, parts = get_i64(args, IMAGES), get_i64(args, PARTS)
        for image in range(cut(images, parts, part), cut(images, parts, part + 1)):
            source = get_i64(args, X) + 4 * image * get_i64(args, CHANNELS) * plane
            for y in range(height):
                for i in range(each):
                    row = source + 4 * (each * y + i) * line
                    convolved(row, pixels, places, patch, weights, z + 4 * i * pitch, each * width)
                target = get_i64(args, OUT) + (image * height + y) * width * outs * bytes_each
                for v in range(0, lanes, 16):
                    some = min(16, outs - v)
                    if some == 16:
                        for pixel in range(width):
                            store(target, pixel * outs + v, finished(z, pitch, pixel, v))
                    else:
                        for pixel in range(width):
                            store_some(target, pixel * outs + v, finished(z, pitch, pixel, v), some)

    return kernel


def stem_reduce(storage, activation, residual, pool, vectors):
    """Sums over the pixels of each part: dz times the patch, and after them dz."""
    rows, lanes, tile, scaled, convolved, steps, size = _tools(pool, vectors)
    load_some, bytes_each = storage.load_some, storage.size
    act = activation.backward

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
        patch, outs = _patch(args), get_i64(args, OUT_CHANNELS)
        line, plane = get_i64(args, WIDTH), get_i64(args, HEIGHT) * get_i64(args, WIDTH)
        height, width, each = size(args)
        padded = (patch + rows - 1) // rows * rows  # the rows beyond the patch are not read
        weights = get_i64(args, SCRATCH) + part * get_i64(args, SCRATCH_STEP)
        places = weights + 4 * lanes * (patch + 1)
        pixels = places + 8 * (patch + 16)
        table = pixels + 8 * each * width
        z = table + 4 * lanes * (padded + 1)
        pitch = each * width * lanes
        sums = get_i64(args, SUMS) + 8 * part * lanes * (padded + 1)
        scaled(args, weights)
        for k in range(padded):
            put_i64(places, k, 4 * _place(args, min(k, patch - 1)))
        steps(pixels, each * width)
        clear(table, lanes * (padded + 1))
        for i in range(lanes * (padded + 1)):
            put_f64(sums, i, 0.0)
        images, parts = get_i64(args, IMAGES), get_i64(args, PARTS)
        for image in range(cut(images, parts, part), cut(images, parts, part + 1)):
            source = get_i64(args, X) + 4 * image * get_i64(args, CHANNELS) * plane
            for y in range(height):
                for i in range(each):
                    row = source + 4 * (each * y + i) * line
                    convolved(row, pixels, places, patch, weights, z + 4 * i * pitch, each * width)
                grad = get_i64(args, GRAD) + (image * height + y) * width * outs * bytes_each
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
                        here = table + 4 * lanes * k
                        tile(
                            row,
                            places + 8 * k,
                            pixels,
                            each * width,
                            z + 4 * i * pitch,
                            here,
                            4 * lanes,
                            here,
                            4 * lanes,
                        )
            flush(table, sums, lanes * (padded + 1))

    return kernel


def finish_stem_gradients(storage, activation, residual, pool, vectors):
    """The gradients of γ, β and the convolution's weight."""
    rows, lanes = ROWS[vectors - 1], 16 * vectors

    def kernel(args, part):
        patch, parts, sums = _patch(args), get_i64(args, PARTS), get_i64(args, SUMS)
        padded = (patch + rows - 1) // rows * rows
        step = lanes * (padded + 1)
        weight, dweight = get_i64(args, WEIGHT), get_i64(args, DWEIGHT)
        means, projected = get_i64(args, PATCH), get_i64(args, COVARIANCE)
        gamma = get_i64(args, GAMMA)
        for p in range(1, parts):
            for i in range(step):
                put_f64(sums, i, get_f64(sums, i) + get_f64(sums, p * step + i))
        for o in range(get_i64(args, OUT_CHANNELS)):
            invstd, dbeta, dgamma = get_f32(get_i64(args, INVSTD), o), get_f64(sums, padded * lanes + o), 0.0
            for k in range(patch):
                centred = get_f64(sums, k * lanes + o) - get_f64(means, k) * dbeta
                put_f64(sums, k * lanes + o, centred)
                dgamma += invstd * centred * get_f32(weight, o * patch + k)
            scale = invstd
            if gamma != 0:
                scale = invstd * get_f32(gamma, o)
            for k in range(patch):
                back = dgamma * invstd * get_f64(projected, o * patch + k)
                put_f32(dweight, o * patch + k, scale * (get_f64(sums, k * lanes + o) - back))
            put_f32(get_i64(args, DBETA), o, dbeta)
            put_f32(get_i64(args, DGAMMA), o, dgamma)

    return kernel
