"""The statistics of a convolution's output from those of the patches it reads; see ``stem``."""

import math

from ...cpu.jit.loads import float32, get_f32, get_f64, get_i64, put_f32, put_f64, put_i64
from ...cpu.jit.simd import fma, inlined, splat, total
from ...cpu.jit.tables import clear, cut
from ..stem_arguments import (
    CHANNELS,
    COVARIANCE,
    EPS,
    HEIGHT,
    IMAGES,
    INVSTD,
    KERNEL_HEIGHT,
    KERNEL_WIDTH,
    MEAN,
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

_load, _store = float32.load, float32.store
_load_some = float32.load_some


@inlined
def patch_size(args):
    """The number of values in a patch."""
    return get_i64(args, CHANNELS) * get_i64(args, KERNEL_HEIGHT) * get_i64(args, KERNEL_WIDTH)


@inlined
def output_size(args):
    """Height and width of what the convolution gives."""
    height = get_i64(args, HEIGHT) - get_i64(args, KERNEL_HEIGHT) + 1
    return height, get_i64(args, WIDTH) - get_i64(args, KERNEL_WIDTH) + 1


@inlined
def place_of(args, k):
    """How far value k of a patch lies from its first one in the image, in values."""
    kernel_height, kernel_width = get_i64(args, KERNEL_HEIGHT), get_i64(args, KERNEL_WIDTH)
    channel, within = k // (kernel_height * kernel_width), k % (kernel_height * kernel_width)
    row = channel * get_i64(args, HEIGHT) + within // kernel_width
    return row * get_i64(args, WIDTH) + within % kernel_width


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
        patch, line = patch_size(args), get_i64(args, WIDTH)
        height, width = output_size(args)
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
            put_i64(places, k, 4 * place_of(args, min(k, patch - 1)))
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
        patch, parts, sums = patch_size(args), get_i64(args, PARTS), get_i64(args, SUMS)
        height, width = output_size(args)
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
