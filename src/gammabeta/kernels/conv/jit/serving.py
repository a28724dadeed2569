"""A convolution with the activation and 2x2 mean behind it, in one pass: z = Σ weight · patch + bias.

A band of output rows is done at a time: its patches times a block of channels give z in working memory, which
the cache holds, and that is activated, pooled and written. Where the values of a patch lie is in a table, so
any layout, stride and dilation of the input is read in place. With zeros around an image, what a band reads
is first copied between zeros; the image is channels_last then. A stem's forward pass is this one too.
"""

from ...cpu.jit.loads import float32, get_f32, put_f32, put_i64
from ...cpu.jit.record import takes
from ...cpu.jit.simd import inlined, splat
from ...cpu.jit.tables import clear, cut
from ..arguments import ROWS, ServingArguments
from .products import Patches, Rows, tile_of

_load, _load_some = float32.load, float32.load_some
_store, _store_some = float32.store, float32.store_some


@takes(ServingArguments)
def serving_convolution(storage, activation, residual, pool, vectors):
    """A part is a run of bands; the sums are the same however they are cut."""
    rows, lanes = ROWS[vectors - 1], 16 * vectors
    tile = tile_of(rows, vectors)
    act, store, store_some, size = activation.forward, storage.store, storage.store_some, storage.size
    each = 2 if pool else 1  # rows and columns of z that one of the output takes

    @inlined
    def places(args, table, count, width):
        """How far each patch of a band lies from its first; the last one again up to a whole tile."""
        for pixel in range((count + rows - 1) // rows * rows):
            known = min(pixel, count - 1)
            down, right = known // width, known % width
            put_i64(table, pixel, down * args.row_step + right * args.pixel_step)

    @inlined
    def start(args, table):
        """The bias, zeros beyond it."""
        clear(table, lanes * args.blocks)
        if args.bias != 0:
            for o in range(args.out_channels):
                put_f32(table, o, get_f32(args.bias, o))

    @inlined
    def surround(args, image, first, sheet):
        """Copy the rows that a band reads, from row ``first`` on, with the zeros around them."""
        row, pitch, left = args.in_row, args.sheet_row, args.left
        full = row - row % 16
        for i in range(args.reach):
            line, y = sheet + 4 * i * pitch, first + i
            clear(line, (pitch + 15) // 16 * 16)  # what is cleared beyond it is written next, or not read
            if 0 <= y < args.in_height:
                source = image + 4 * y * row
                for j in range(0, full, 16):
                    _store(line, left + j, _load(source, j))
                if full < row:
                    _store_some(line, left + full, _load_some(source, full, row - full), row - full)

    @inlined
    def finished(z, pitch, pixel, v):
        """A vector of the output: z activated, or its 2x2 mean; ``pitch``: from a row of z to the next."""
        if not pool:
            return act(_load(z, pixel * lanes + v))
        left, right = 2 * pixel * lanes + v, (2 * pixel + 1) * lanes + v
        upper = act(_load(z, left)) + act(_load(z, right))
        lower = act(_load(z, pitch + left)) + act(_load(z, pitch + right))
        return (upper + lower) * splat(0.25)

    @inlined
    def write(z, pitch, target, width, outs, v, some):
        """A row of the output: of its ``outs`` channels ``some`` from v on, at most sixteen."""
        if some == 16:
            for pixel in range(width):
                store(target, pixel * outs + v, finished(z, pitch, pixel, v))
        else:
            for pixel in range(width):
                store_some(target, pixel * outs + v, finished(z, pitch, pixel, v), some)

    @inlined
    def write_block(z, target, height, width, outs, left):
        """Finish a block of z; ``left`` channels remain from the block's first on."""
        pitch = each * width * lanes
        for v in range(0, min(lanes, left), 16):
            some = min(16, left - v)
            for y in range(height):
                row = target + size * y * width * outs
                write(z + 4 * each * y * pitch, pitch, row, width, outs, v, some)

    def kernel(args, part):
        height, width = args.height, args.width
        outs, taps, count = args.out_channels, args.taps, args.values
        band, bands = args.band, args.bands
        most = each * each * band * width
        bias = args.scratch + part * args.scratch_step
        z = bias + 4 * lanes * args.blocks
        table = z + 4 * lanes * (most + rows)
        sheet = table + 8 * (most + rows)
        start(args, bias)
        places(args, table, most, each * width)
        units, parts = args.images * bands, args.parts
        for unit in range(cut(units, parts, part), cut(units, parts, part + 1)):
            image, first = unit // bands, unit % bands * band
            some = min(band, height - first)
            source = args.x + image * args.image_step
            if args.sheet_row == 0:
                source += each * first * args.row_step
            else:
                down = args.row_step // (4 * args.sheet_row)  # the stride
                surround(args, source, each * first * down - args.top, sheet)
                source = sheet
            target = args.out + size * (image * height + first) * width * outs
            for block in range(args.blocks):
                weights, biases = args.weight + 4 * lanes * count * block, Rows(bias + 4 * lanes * block, 0)
                for pixel in range(0, each * each * some * width, rows):
                    patches = Patches(source, table + 8 * pixel, taps, count)
                    tile(patches, weights, biases, Rows(z + 4 * lanes * pixel, 4 * lanes))
                write_block(z, target + size * lanes * block, some, width, outs, outs - lanes * block)

    return kernel
