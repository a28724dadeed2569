"""The gradients of a convolution, channels_last, stride and dilation 1.

*At the input*: ``dx[y, x] = Σ grad[oy, ox] @ weight[ky, kx]`` over all ``oy + ky = y + pad`` and ``ox + kx =
x + pad``. What one output pixel gives to its patch is a row of KH·KW·C values, ``grad[oy, ox] @ weight``; the
rows of a group of pixels are a matrix product whose columns fill whole vectors at any C. A row of the kernel
is KW·C values side by side in the patch and in the image alike, so the patches are added up, in float32, in
an image of working memory. Grad is read and dx written once; all else stays in the core's caches. A tile is
six pixels by four vectors: 24 sums in registers (``products``). Its weights lie side by side in working
memory. In bfloat16 two output channels are multiplied at once (AVX-512 BF16); sums are float32.

*The weight's, in bfloat16*: ``dw[o, ky, kx, c] = Σ grad[oy, ox, o] x[oy + ky, ox + kx, c]`` over images and
pixels. AVX-512 BF16 multiplies two pairs of values and adds both products to a float32 sum: here the pairs
are of two images, laid out side by side in working memory once, where they serve every place of the kernel. A
tile is a few values of a patch by up to 64 output channels; its sums stay in registers for all pixels that
are laid out.
"""

from ...cpu.jit.loads import bfloat16, float32, get_f32, put_f32, put_i64
from ...cpu.jit.record import takes
from ...cpu.jit.simd import inlined, pair, splat
from ...cpu.jit.tables import clear, cut
from ..arguments import COLUMNS, GROUP, LAID_OUT, PIXELS, ROWS, GradientArguments
from .products import Patches, Rows, tile_of

_load, _store = float32.load, float32.store
_load_some, _store_some = float32.load_some, float32.store_some
_load_half, _load_some_halves = bfloat16.load, bfloat16.load_some


@inlined
def _sizes(args):
    """Values in a patch; rows of an image with its zeros, values in a row; rows and columns of the output."""
    channels = args.channels
    kernel_height, kernel_width = args.kernel_height, args.kernel_width
    height = args.height + 2 * args.pad_height
    width = args.width + 2 * args.pad_width
    patch = kernel_height * kernel_width * channels
    return patch, height, width * channels, height - kernel_height + 1, width - kernel_width + 1


@takes(GradientArguments)
def input_gradient(storage, activation, residual, pool):
    """A part is a run of images; the order of additions is the same however they are cut."""
    load_some, store, store_some, size = storage.load_some, storage.store, storage.store_some, storage.size
    paired = storage is bfloat16
    tile = tile_of(PIXELS, COLUMNS // 16, paired)
    each = 2 if paired else 1  # output channels that one step of a tile takes

    @inlined
    def packed(args, target):
        """Lay the weights out as tiles read them: blocks of 64 columns, in each one the output channels."""
        weight, outs, width = args.weight, args.out_channels, _sizes(args)[0]
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
        patch, _, line, out_height, out_width = _sizes(args)
        channels, outs, pixels = args.channels, args.out_channels, out_height * out_width
        values, run = args.width * channels, args.kernel_width * channels
        columns, steps = (patch + COLUMNS - 1) // COLUMNS * COLUMNS, outs // each
        images, parts = args.images, args.parts
        weights = args.scratch + part * args.scratch_step
        rows = weights + 4 * columns * steps
        zeros = rows + 4 * columns * (GROUP + PIXELS)
        pixel_places = zeros + 4 * COLUMNS
        steps_on = pixel_places + 8 * PIXELS
        sheet = steps_on + 8 * steps
        end = weights + args.scratch_step
        packed(args, weights)
        clear(zeros, COLUMNS)
        for i in range(PIXELS):
            put_i64(pixel_places, i, i * outs * size)
        for i in range(steps):
            put_i64(steps_on, i, 4 * i)
        for image in range(cut(images, parts, part), cut(images, parts, part + 1)):
            clear(sheet, (end - sheet) // 4)
            grad = args.grad + image * pixels * outs * size
            for start in range(0, pixels, GROUP):
                stop = min(start + GROUP, pixels)
                for block in range(0, columns, COLUMNS):
                    for pixel in range(start, stop, PIXELS):
                        first = min(pixel, stop - PIXELS)  # the last tile may take some pixels again
                        row = rows + 4 * ((first - start + PIXELS) * columns + block)
                        patches = Patches(grad + first * outs * size, pixel_places, steps_on, steps)
                        tile(patches, weights + 4 * block * steps, Rows(zeros, 0), Rows(row, 4 * columns))
                for pixel in range(start, stop):
                    oy, ox = pixel // out_width, pixel % out_width
                    row = rows + 4 * (pixel - start + PIXELS) * columns
                    for ky in range(args.kernel_height):
                        add(row + 4 * ky * run, sheet + 4 * ((oy + ky) * line + ox * channels), run)
            target = args.x + image * args.height * values * size
            for y in range(args.height):
                first = sheet + 4 * ((y + args.pad_height) * line + args.pad_width * channels)
                copy(first, target + y * values * size, values)

    return kernel


@takes(GradientArguments)
def weight_gradient(storage, activation, residual, pool, vectors):
    """The sums over a part's pairs of images, (K, 16 V) float32 for each block of output channels."""
    rows, lanes = ROWS[vectors - 1], 16 * vectors
    tile = tile_of(rows, vectors, paired=True)

    @inlined
    def paired(one, other, target, count):
        """``count`` values of two images side by side; no other image: zeros."""
        at = 0
        while at + 16 <= count:
            second = _load_half(other, at) if other != 0 else splat(0.0)
            _store(target, at, pair(_load_half(one, at), second))
            at += 16
        if at < count:
            second = _load_some_halves(other, at, count - at) if other != 0 else splat(0.0)
            _store_some(target, at, pair(_load_some_halves(one, at, count - at), second), count - at)

    @inlined
    def lay_images(args, sheet, one, other, line):
        """The two images, in the middle of their zeros."""
        channels, height = args.channels, args.height
        values = args.width * channels
        start = args.pad_height * line + args.pad_width * channels
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
        channels, outs = args.channels, args.out_channels
        run = args.kernel_width * channels
        padded = (patch + rows - 1) // rows * rows  # the rows beyond the patch are not read
        pixels, blocks = out_height * out_width, (outs + lanes - 1) // lanes
        table = args.scratch + part * args.scratch_step
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
        images, parts = args.images, args.parts
        image_bytes = 2 * args.height * args.width * channels
        pairs = (images + 1) // 2
        for couple in range(cut(pairs, parts, part), cut(pairs, parts, part + 1)):
            one, alone = args.x + 2 * couple * image_bytes, 2 * couple + 1 == images
            lay_images(args, sheet, one, 0 if alone else one + image_bytes, line)
            grad = args.grad + 4 * couple * pixels * outs
            for block in range(blocks):
                for first in range(0, pixels, LAID_OUT):
                    count, here = min(LAID_OUT, pixels - first), grad + 2 * first * outs
                    other = 0 if alone else here + 2 * pixels * outs
                    lay_gradients(grads, here, other, count, outs, block * lanes)
                    for k in range(0, padded, rows):
                        patches = Patches(sheet, places + 8 * k, steps + 8 * first, count)
                        sums = Rows(table + 4 * (block * padded + k) * lanes, 4 * lanes)
                        tile(patches, grads, sums, sums)

    return kernel


@takes(GradientArguments)
def finish_weight_gradient(storage, activation, residual, pool, vectors):
    """Add up the parts."""
    rows, lanes = ROWS[vectors - 1], 16 * vectors

    def kernel(args, part):
        patch, outs = _sizes(args)[0], args.out_channels
        padded = (patch + rows - 1) // rows * rows
        scratch, step = args.scratch, args.scratch_step
        for o in range(outs):
            first = o // lanes * padded * lanes + o % lanes
            for k in range(patch):
                value = 0.0
                for p in range(args.parts):
                    value += get_f32(scratch + p * step, first + k * lanes)
                put_f32(args.weight, o * patch + k, value)

    return kernel
