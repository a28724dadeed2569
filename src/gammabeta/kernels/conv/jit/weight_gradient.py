"""The gradient of a convolution's weight, channels_last, stride and dilation 1, in bfloat16.

``dw[o, ky, kx, c] = Σ grad[oy, ox, o] x[oy + ky, ox + kx, c]`` over images and pixels. AVX-512 BF16
multiplies two pairs of values and adds both products to a float32 sum: here the pairs are of two images, laid
out side by side in working memory once, where they serve every place of the kernel. A tile is a few values of
a patch by up to 64 output channels; its sums stay in registers for all pixels that are laid out.
"""

from ...cpu.jit.loads import bfloat16, float32, get_f32, get_i64, put_f32, put_i64
from ...cpu.jit.simd import inlined, pair, splat
from ...cpu.jit.tables import clear, cut
from ..convolution_arguments import (
    CHANNELS,
    GRAD,
    HEIGHT,
    IMAGES,
    KERNEL_HEIGHT,
    KERNEL_WIDTH,
    LAID_OUT,
    OUT_CHANNELS,
    PAD_HEIGHT,
    PAD_WIDTH,
    PARTS,
    SCRATCH,
    SCRATCH_STEP,
    WEIGHT,
    WIDTH,
    X,
)
from ..registers import ROWS
from .products import tile_of

_store, _store_some = float32.store, float32.store_some
_load, _load_some = bfloat16.load, bfloat16.load_some


@inlined
def _sizes(args):
    """Values in a patch; rows of an image with its zeros, values in a row; rows and columns of the output."""
    channels = get_i64(args, CHANNELS)
    kernel_height, kernel_width = get_i64(args, KERNEL_HEIGHT), get_i64(args, KERNEL_WIDTH)
    height = get_i64(args, HEIGHT) + 2 * get_i64(args, PAD_HEIGHT)
    width = get_i64(args, WIDTH) + 2 * get_i64(args, PAD_WIDTH)
    patch = kernel_height * kernel_width * channels
    return patch, height, width * channels, height - kernel_height + 1, width - kernel_width + 1


def weight_gradient(storage, activation, residual, pool, vectors):
    """The sums over a part's pairs of images, (K, 16 V) float32 for each block of output channels."""
    rows, lanes = ROWS[vectors - 1], 16 * vectors
    tile = tile_of(rows, vectors, paired=True)

    @inlined
    def paired(one, other, target, count):
        """``count`` values of two images side by side; no other image: zeros."""
        at = 0
        while at + 16 <= count:
            second = _load(other, at) if other != 0 else splat(0.0)
            _store(target, at, pair(_load(one, at), second))
            at += 16
        if at < count:
            second = _load_some(other, at, count - at) if other != 0 else splat(0.0)
            _store_some(target, at, pair(_load_some(one, at, count - at), second), count - at)

    @inlined
    def lay_images(args, sheet, one, other, line):
        """The two images, in the middle of their zeros."""
        channels, height = get_i64(args, CHANNELS), get_i64(args, HEIGHT)
        values = get_i64(args, WIDTH) * channels
        start = get_i64(args, PAD_HEIGHT) * line + get_i64(args, PAD_WIDTH) * channels
        for y in range(height):
            second = other + 2 * y * values if other != 0 else 0
            paired(one + 2 * y * values, second, sheet + 4 * (start + y * line), values)

    @inlined
    def lay_gradients(grads, one, other, pixels, outs, block):
        """The gradients of a block of channels, a row of whole vectors for each pixel."""
        count = min(lanes, outs - block)
        for pixel in range(pixels):
            at = 2 * (pixel * outs + block)
            second = other + at if other != 0 else 0
            paired(one + at, second, grads + 4 * pixel * lanes, count)

    def kernel(args, part):
        patch, height, line, out_height, out_width = _sizes(args)
        channels, outs = get_i64(args, CHANNELS), get_i64(args, OUT_CHANNELS)
        run = get_i64(args, KERNEL_WIDTH) * channels
        padded = (patch + rows - 1) // rows * rows  # the rows beyond the patch are not read
        pixels, blocks = out_height * out_width, (outs + lanes - 1) // lanes
        table = get_i64(args, SCRATCH) + part * get_i64(args, SCRATCH_STEP)
        grads = table + 4 * blocks * padded * lanes
        sheet = grads + 4 * LAID_OUT * lanes
        places = sheet + 4 * ((height * line + 15) // 16 * 16)
        steps = places + 8 * padded
        clear(table, blocks * padded * lanes)
        clear(grads, LAID_OUT * lanes)
        clear(sheet, (height * line + 15) // 16 * 16)
        for k in range(padded):
            inside = min(k, patch - 1)
            put_i64(places, k, 4 * (inside // run * line + inside % run))
        for pixel in range(pixels):
            put_i64(steps, pixel, 4 * (pixel // out_width * line + pixel % out_width * channels))
        images, parts = get_i64(args, IMAGES), get_i64(args, PARTS)
        image_bytes = 2 * get_i64(args, HEIGHT) * get_i64(args, WIDTH) * channels
        pairs = (images + 1) // 2
        for couple in range(cut(pairs, parts, part), cut(pairs, parts, part + 1)):
            one, alone = get_i64(args, X) + 2 * couple * image_bytes, 2 * couple + 1 == images
            lay_images(args, sheet, one, 0 if alone else one + image_bytes, line)
            grad = get_i64(args, GRAD) + 4 * couple * pixels * outs
            for block in range(blocks):
                for first in range(0, pixels, LAID_OUT):
                    count, here = min(LAID_OUT, pixels - first), grad + 2 * first * outs
                    other = 0 if alone else here + 2 * pixels * outs
                    lay_gradients(grads, here, other, count, outs, block * lanes)
                    for k in range(0, padded, rows):
                        target = table + 4 * (block * padded + k) * lanes
                        tile(
                            sheet,
                            places + 8 * k,
                            steps + 8 * first,
                            count,
                            grads,
                            target,
                            4 * lanes,
                            target,
                            4 * lanes,
                        )

    return kernel


def finish_weight_gradient(storage, activation, residual, pool, vectors):
    """Add up the parts."""
    rows, lanes = ROWS[vectors - 1], 16 * vectors

    def kernel(args, part):
        patch, outs = _sizes(args)[0], get_i64(args, OUT_CHANNELS)
        padded = (patch + rows - 1) // rows * rows
        scratch, step = get_i64(args, SCRATCH), get_i64(args, SCRATCH_STEP)
        for o in range(outs):
            first = o // lanes * padded * lanes + o % lanes
            for k in range(patch):
                value = 0.0
                for p in range(get_i64(args, PARTS)):
                    value += get_f32(scratch + p * step, first + k * lanes)
                put_f32(get_i64(args, WEIGHT), o * patch + k, value)

    return kernel
