"""What the kernels of ``stem`` are handed: the address of 64-bit slots. ``EPS`` is float64, all else int64.

K = C·KH·KW is the number of values in a patch, and V the number of vectors that hold O channels.
"""

import struct

# float32: images (N, C, H, W) contiguous, the convolution's weight (O, C, KH, KW) and its gradient
X, WEIGHT, DWEIGHT = range(3)
# in the storage type, channels_last: the output, and the gradient there
OUT, GRAD = 3, 4
# (O,) float32; MEAN is without the convolution's bias
MEAN, VAR, INVSTD, GAMMA, BETA, DGAMMA, DBETA = range(5, 12)
# float64: the mean patch (K,) and, for each channel, the covariance of its output with the patch (O, K)
PATCH, COVARIANCE = 12, 13
# float64, of each part: sums of patches (K,) and of their products (K, K); or of gradients (K + 1, 16 V)
SUMS = 14
# working memory, the bytes of it that each part has
SCRATCH, SCRATCH_STEP = 15, 16
IMAGES, CHANNELS, HEIGHT, WIDTH, OUT_CHANNELS, KERNEL_HEIGHT, KERNEL_WIDTH, PARTS = range(17, 25)
EPS = 25

_PACKER = struct.Struct("=25qd")


def pack(*values: float) -> bytes:
    """The slots as bytes, in the order above."""
    return _PACKER.pack(*values)
