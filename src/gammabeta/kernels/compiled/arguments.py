"""What a compiled kernel is handed: the address of 64-bit slots, laid out the same for every kernel.

A slot that holds an address is 0 where the tensor is absent. ``EPS`` and ``FACTOR`` are float64, all else
int64.
"""

import struct

# (N, C, S) tensors in the storage type
X, RESIDUAL, GRAD, OUT, DX, DRESIDUAL = range(6)
# (C,) float32
MEAN, VAR, INVSTD, WEIGHT, BIAS, DWEIGHT, DBIAS, MEAN_DZ, MEAN_DZ_XHAT = range(6, 15)
# float64 (image_parts, 2, C) partial sums, then (C,): the value every channel was shifted by
SUMS = 15
# working memory, and the bytes of it that each part has
SCRATCH, SCRATCH_STEP = 16, 17
# sizes; without pooling height is 1 and width is all of S
IMAGES, CHANNELS, HEIGHT, WIDTH = range(18, 22)
# channels_last only: elements in a tile, a whole number of pixels
TILE = 22
# how the work is cut: part = image_part * channel_parts + channel_part
IMAGE_PARTS, CHANNEL_PARTS = 23, 24
# 1: write the output past the caches
STREAM = 25
# 1: statistics that are not finite update nothing
SKIP = 26
EPS = 27
FACTOR = 28

_PACKER = struct.Struct("=27q2d")


def pack(*values: float) -> bytes:
    """The slots as bytes, in the order above."""
    return _PACKER.pack(*values)
