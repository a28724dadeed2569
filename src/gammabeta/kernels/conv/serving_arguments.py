"""What ``serving`` is handed: the address of 64-bit slots, all int64.

T is the number of values one output value is a sum of, V the number of vectors in a block of channels.
"""

import struct

# float32: the input; weights in blocks (T, 16 V); the bias (O,), or 0; the output, channels_last
X, WEIGHT, BIAS, OUT = range(4)
TAPS, SCRATCH = (
    4,
    5,
)  # int64 (T,): how far each value of a patch lies from its first, in bytes; working memory
# of the input, in bytes: from an image to the next, from a patch to the one below, to the one beside it
IMAGE_STEP, ROW_STEP, PIXEL_STEP = range(6, 9)
COUNT, BLOCKS = 9, 10  # T, and the number of blocks
IMAGES, HEIGHT, WIDTH, OUT_CHANNELS = range(11, 15)  # of the output
BAND, BANDS = 15, 16  # output rows done at once, and how many such bands an image has
SCRATCH_STEP, PARTS = 17, 18  # the bytes of working memory that each part has
# Of an image with zeros around it, in values: a row without them, a row with them (0: there are none),
# those to the left; in rows: the image, the zeros above it, what a band reads.
IN_ROW, SHEET_ROW, LEFT, IN_HEIGHT, TOP, REACH = range(19, 25)

_PACKER = struct.Struct("=25q")


def pack(*values: int) -> bytes:
    """The slots as bytes, in the order above."""
    return _PACKER.pack(*values)
