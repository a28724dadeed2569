"""What a compiled kernel is handed: the address of 64-bit slots, laid out the same for every kernel.

A slot that holds an address is 0 where the tensor is absent. ``EPS`` and ``FACTOR`` are float64, all else
int64.
"""

import struct

# (N, C, S) tensors in the storage type
X, RESIDUAL, GRAD, OUT, DX, DRESIDUAL = range(6)
# one byte for each element of OUT: which of its window it is (``windows``)
CODES = 6
# (C,) float32
MEAN, VAR, INVSTD, WEIGHT, BIAS, DWEIGHT, DBIAS, MEAN_DZ, MEAN_DZ_XHAT = range(7, 16)
# float64 (image_parts, 2, C) partial sums, then (C,): the value every channel was shifted by
SUMS = 16
# working memory, and the bytes of it that each part has
SCRATCH, SCRATCH_STEP = 17, 18
# sizes; without pooling height is 1 and width is all of S
IMAGES, CHANNELS, HEIGHT, WIDTH = range(19, 23)
# channels_last: elements in a tile, a whole number of pixels; contiguous: in a row's phase (``windows``)
TILE = PHASE = 23
# contiguous: channels that are worked on together (``groups``)
GROUP = 24
# how the work is cut: part = image_part * channel_parts + channel_part
IMAGE_PARTS, CHANNEL_PARTS = 25, 26
# 1: write the output past the caches
STREAM = 27
# 1: statistics that are not finite update nothing
SKIP = 28
EPS = 29
FACTOR = 30

# What the plan must know of the working memory that contiguous kernels use: ``groups``, ``windows``
NEAR = 1024  # elements of a plane too short for the processor to foresee the next image's
ACCOUNT = 192  # bytes for each channel of a group
MARGIN = 16  # zeros before a piece of a row of gradients, for the columns to the left of its first window

_PACKER = struct.Struct("=29q2d")


def pack(*values: float) -> bytes:
    """The slots as bytes, in the order above."""
    return _PACKER.pack(*values)
