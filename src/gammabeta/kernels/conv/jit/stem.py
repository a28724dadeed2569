"""A network's first convolution with the batch normalization, activation and 2x2 mean behind it, as one.

What such a convolution gives is large, and a patch of what it reads is small: it is cheaper to convolve anew
than to read. So its output is never written. Its statistics follow from those of the patches: with their
mean p and covariance S, an output channel of weight w has mean w·p and variance w'Sw. The backward pass needs
the sums over all pixels of dz and of dz times the patch, and from these all gradients follow (``gammabeta.
kernels.stem`` has the mathematics).
"""

from ...cpu.jit.loads import float32, float64, get_f32, get_f64, get_i64, put_f32, put_f64, put_i64
from ...cpu.jit.simd import inlined, splat, widen
from ...cpu.jit.tables import clear, cut
from ..registers import ROWS
from ..stem_arguments import (
    BETA,
    CHANNELS,
    COVARIANCE,
    DBETA,
    DGAMMA,
    DWEIGHT,
    GAMMA,
    GRAD,
    HEIGHT,
    IMAGES,
    INVSTD,
    MEAN,
    OUT,
    OUT_CHANNELS,
    PARTS,
    PATCH,
    SCRATCH,
    SCRATCH_STEP,
    SUMS,
    WEIGHT,
    WIDTH,
    X,
)
from .output import writer
from .products import tile_of
from .stem_statistics import output_size, patch_size, place_of

_load, _store = float32.load, float32.store
_load_wide, _store_wide = float64.load, float64.store


def _tools(pool, vectors):
    """What forward and backward share: the weights with the normalisation in them, and a row of z."""
    rows = ROWS[vectors - 1]
    lanes = 16 * vectors
    tile = tile_of(rows, vectors)

    @inlined
    def scaled(args, weights):
        """``w γ invstd``, a row of channels for each value of a patch, and a last row: β less the mean."""
        patch, outs = patch_size(args), get_i64(args, OUT_CHANNELS)
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
        height, width = output_size(args)
        if pool:
            return height // 2, width // 2, 2
        return height, width, 1

    return rows, lanes, tile, scaled, convolved, steps, size


def stem_forward(storage, activation, residual, pool, vectors):
    """``pool(activation(z))``, z being the convolution's output normalised."""
    _, lanes, _, scaled, convolved, steps, size = _tools(pool, vectors)
    write, bytes_each = writer(storage, activation, pool, lanes), storage.size

    def kernel(args, part):
        patch, outs = patch_size(args), get_i64(args, OUT_CHANNELS)
        line, plane = get_i64(args, WIDTH), get_i64(args, HEIGHT) * get_i64(args, WIDTH)
        height, width, each = size(args)
        weights = get_i64(args, SCRATCH) + part * get_i64(args, SCRATCH_STEP)
        places = weights + 4 * lanes * (patch + 1)
        pixels = places + 8 * (patch + 16)
        z = pixels + 8 * each * width
        pitch = each * width * lanes
        scaled(args, weights)
        for k in range(patch):
            put_i64(places, k, 4 * place_of(args, k))
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
                    write(z, pitch, target, width, outs, v, min(16, outs - v))

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
        patch, outs = patch_size(args), get_i64(args, OUT_CHANNELS)
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
            put_i64(places, k, 4 * place_of(args, min(k, patch - 1)))
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
        patch, parts, sums = patch_size(args), get_i64(args, PARTS), get_i64(args, SUMS)
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
