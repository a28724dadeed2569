"""A convolution with the activation and 2x2 mean behind it, in one pass: z = Σ weight · patch + bias.

A band of output rows is done at a time: its patches times a block of channels give z in working memory, which
the cache holds, and that is activated, pooled and written. Where the values of a patch lie is in a table, so
any layout, stride and dilation of the input is read in place. With zeros around an image, what a band reads
is first copied between zeros; the image is channels_last then.
"""

from ...cpu.jit.loads import float32, get_f32, get_i64, put_f32, put_i64
from ...cpu.jit.simd import inlined
from ...cpu.jit.tables import clear, cut
from ..registers import ROWS
from ..serving_arguments import (
    BAND,
    BANDS,
    BIAS,
    BLOCKS,
    COUNT,
    HEIGHT,
    IMAGE_STEP,
    IMAGES,
    IN_HEIGHT,
    IN_ROW,
    LEFT,
    OUT,
    OUT_CHANNELS,
    PARTS,
    PIXEL_STEP,
    REACH,
    ROW_STEP,
    SCRATCH,
    SCRATCH_STEP,
    SHEET_ROW,
    TAPS,
    TOP,
    WEIGHT,
    WIDTH,
    X,
)
from .output import writer
from .products import tile_of

_load, _load_some = float32.load, float32.load_some
_store, _store_some = float32.store, float32.store_some


def serving_convolution(storage, activation, residual, pool, vectors):
    """A part is a run of bands; the sums are the same however they are cut."""
    rows, lanes = ROWS[vectors - 1], 16 * vectors
    tile = tile_of(rows, vectors)
    write = writer(storage, activation, pool, lanes)
    each = 2 if pool else 1  # rows and columns of z that one of the output takes

    @inlined
    def places(args, table, count, width):
        """How far each patch of a band lies from its first; the last one again up to a whole tile."""
        for pixel in range((count + rows - 1) // rows * rows):
            known = min(pixel, count - 1)
            down, right = known // width, known % width
            put_i64(table, pixel, down * get_i64(args, ROW_STEP) + right * get_i64(args, PIXEL_STEP))

    @inlined
    def start(args, table):
        """The bias, zeros beyond it."""
        clear(table, lanes * get_i64(args, BLOCKS))
        if get_i64(args, BIAS) != 0:
            for o in range(get_i64(args, OUT_CHANNELS)):
                put_f32(table, o, get_f32(get_i64(args, BIAS), o))

    @inlined
    def surround(args, image, first, sheet):
        """Copy the rows that a band reads, from row ``first`` on, with the zeros around them."""
        row, pitch, left = get_i64(args, IN_ROW), get_i64(args, SHEET_ROW), get_i64(args, LEFT)
        full = row - row % 16
        for i in range(get_i64(args, REACH)):
            line, y = sheet + 4 * i * pitch, first + i
            clear(line, (pitch + 15) // 16 * 16)  # what is cleared beyond it is written next, or not read
            if 0 <= y < get_i64(args, IN_HEIGHT):
                source = image + 4 * y * row
                for j in range(0, full, 16):
                    _store(line, left + j, _load(source, j))
                if full < row:
                    _store_some(line, left + full, _load_some(source, full, row - full), row - full)

    @inlined
    def write_block(z, target, height, width, outs, left):
        """Finish a block of z; ``left`` channels remain from the block's first on."""
        pitch = each * width * lanes
        for v in range(0, min(lanes, left), 16):
            some = min(16, left - v)
            for y in range(height):
                write(z + 4 * each * y * pitch, pitch, target + 4 * y * width * outs, width, outs, v, some)

    def kernel(args, part):
        height, width = get_i64(args, HEIGHT), get_i64(args, WIDTH)
        outs, taps, count = get_i64(args, OUT_CHANNELS), get_i64(args, TAPS), get_i64(args, COUNT)
        band, bands = get_i64(args, BAND), get_i64(args, BANDS)
        most = each * each * band * width
        bias = get_i64(args, SCRATCH) + part * get_i64(args, SCRATCH_STEP)
        z = bias + 4 * lanes * get_i64(args, BLOCKS)
        table = z + 4 * lanes * (most + rows)
        sheet = table + 8 * (most + rows)
        start(args, bias)
        places(args, table, most, each * width)
        units, parts = get_i64(args, IMAGES) * bands, get_i64(args, PARTS)
        for unit in range(cut(units, parts, part), cut(units, parts, part + 1)):
            image, first = unit // bands, unit % bands * band
            some = min(band, height - first)
            source = get_i64(args, X) + image * get_i64(args, IMAGE_STEP)
            if get_i64(args, SHEET_ROW) == 0:
                source += each * first * get_i64(args, ROW_STEP)
            else:
                down = get_i64(args, ROW_STEP) // (4 * get_i64(args, SHEET_ROW))  # the stride
                surround(args, source, each * first * down - get_i64(args, TOP), sheet)
                source = sheet
            target = get_i64(args, OUT) + 4 * (image * height + first) * width * outs
            for block in range(get_i64(args, BLOCKS)):
                weights, first_sum = (
                    get_i64(args, WEIGHT) + 4 * lanes * count * block,
                    bias + 4 * lanes * block,
                )
                for pixel in range(0, each * each * some * width, rows):
                    here, there = table + 8 * pixel, z + 4 * lanes * pixel
                    tile(source, here, taps, count, weights, first_sum, 0, there, 4 * lanes)
                left = outs - lanes * block
                write_block(z, target + 4 * lanes * block, some, width, outs, left)

    return kernel
