"""The gradient at a convolution's input, channels_last, stride and dilation 1.

``dx[y, x] = Σ grad[oy, ox] @ weight[ky, kx]`` over all ``oy + ky = y + pad`` and ``ox + kx = x + pad``. What
one output pixel gives to its patch is a row of KH·KW·C values, ``grad[oy, ox] @ weight``; the rows of a group
of pixels are a matrix product whose columns fill whole vectors at any C. A row of the kernel is KW·C values
side by side in the patch and in the image alike, so the patches are added up, in float32, in an image of
working memory. Grad is read and dx written once; all else stays in the core's caches.

A tile is six pixels by four vectors: 24 sums in registers (``products``). Its weights lie side by side in
working memory. In bfloat16 two output channels are multiplied at once (AVX-512 BF16); sums are float32.
"""

from ...cpu.jit.loads import bfloat16, float32, get_i64, put_i64
from ...cpu.jit.simd import inlined, pair
from ...cpu.jit.tables import clear, cut
from ..convolution_arguments import (
    CHANNELS,
    COLUMNS,
    GRAD,
    GROUP,
    HEIGHT,
    IMAGES,
    KERNEL_HEIGHT,
    KERNEL_WIDTH,
    OUT_CHANNELS,
    PAD_HEIGHT,
    PAD_WIDTH,
    PARTS,
    PIXELS,
    SCRATCH,
    SCRATCH_STEP,
    WEIGHT,
    WIDTH,
    X,
)
from .products import tile_of

_load, _store = float32.load, float32.store
_load_some, _store_some = float32.load_some, float32.store_some


def input_gradient(storage, activation, residual, pool):
    """A part is a run of images; the order of additions is the same however they are cut."""
    load_some, store, store_some, size = storage.load_some, storage.store, storage.store_some, storage.size
    paired = storage is bfloat16
    tile = tile_of(PIXELS, COLUMNS // 16, paired)
    each = 2 if paired else 1  # output channels that one step of a tile takes

    @inlined
    def packed(args, target):
        """Lay the weights out as tiles read them: blocks of 64 columns, in each one the output channels."""
        weight, outs = get_i64(args, WEIGHT), get_i64(args, OUT_CHANNELS)
        width = get_i64(args, KERNEL_HEIGHT) * get_i64(args, KERNEL_WIDTH) * get_i64(args, CHANNELS)
        for block in range(0, width, COLUMNS):
            for o in range(0, outs, each):
                for v in range(0, COLUMNS, 16):
                    some = max(0, min(16, width - block - v))
                    at = o * width + block + v
                    values = load_some(weight, at, some)
                    if paired:
                        values = pair(values, load_some(weight, at + width, some))
                    _store(target, (block * (outs // each)) + (o // each) * COLUMNS + v, values)

    @inlined
    def add(source, target, count):
        """``target[i] += source[i]``."""
        at = 0
        while at + 16 <= count:
            _store(target, at, _load(target, at) + _load(source, at))
            at += 16
        if at < count:
            total = _load_some(target, at, count - at) + _load_some(source, at, count - at)
            _store_some(target, at, total, count - at)

    @inlined
    def copy(source, target, count):
        """``target[i] = source[i]`` in the storage type."""
        at = 0
        while at + 16 <= count:
            store(target, at, _load(source, at))
            at += 16
        if at < count:
            store_some(target, at, _load_some(source, at, count - at), count - at)

    def kernel(args, part):
        channels, height, width = get_i64(args, CHANNELS), get_i64(args, HEIGHT), get_i64(args, WIDTH)
        kernel_height, kernel_width = get_i64(args, KERNEL_HEIGHT), get_i64(args, KERNEL_WIDTH)
        pad_height, pad_width = get_i64(args, PAD_HEIGHT), get_i64(args, PAD_WIDTH)
        padded = width + 2 * pad_width
        out_width = padded - kernel_width + 1
        pixels = (height + 2 * pad_height - kernel_height + 1) * out_width
        line = kernel_width * channels
        columns = (kernel_height * line + COLUMNS - 1) // COLUMNS * COLUMNS
        outs = get_i64(args, OUT_CHANNELS)
        steps = outs // each
        images, parts = get_i64(args, IMAGES), get_i64(args, PARTS)
        weights = get_i64(args, SCRATCH) + part * get_i64(args, SCRATCH_STEP)
        rows = weights + 4 * columns * steps
        zeros = rows + 4 * columns * (GROUP + PIXELS)
        pixel_places = zeros + 4 * COLUMNS
        steps_on = pixel_places + 8 * PIXELS
        sheet = steps_on + 8 * steps
        end = weights + get_i64(args, SCRATCH_STEP)
        packed(args, weights)
        clear(zeros, COLUMNS)
        for i in range(PIXELS):
            put_i64(pixel_places, i, i * outs * size)
        for i in range(steps):
            put_i64(steps_on, i, 4 * i)
        for image in range(cut(images, parts, part), cut(images, parts, part + 1)):
            clear(sheet, (end - sheet) // 4)
            grad = get_i64(args, GRAD) + image * pixels * outs * size
            for start in range(0, pixels, GROUP):
                stop = min(start + GROUP, pixels)
                for block in range(0, columns, COLUMNS):
                    for pixel in range(start, stop, PIXELS):
                        first = min(pixel, stop - PIXELS)  # the last tile may take some pixels again
                        row = rows + 4 * ((first - start + PIXELS) * columns + block)
                        tile(
                            grad + first * outs * size,
                            pixel_places,
                            steps_on,
                            steps,
                            weights + 4 * block * steps,
                            zeros,
                            0,
                            row,
                            4 * columns,
                        )
                for pixel in range(start, stop):
                    oy, ox = pixel // out_width, pixel % out_width
                    row = rows + 4 * (pixel - start + PIXELS) * columns
                    for ky in range(kernel_height):
                        add(row + 4 * ky * line, sheet + 4 * ((oy + ky) * padded + ox) * channels, line)
            target = get_i64(args, X) + image * height * width * channels * size
            for y in range(height):
                first = sheet + 4 * ((y + pad_height) * padded + pad_width) * channels
                copy(first, target + y * width * channels * size, width * channels)

    return kernel
