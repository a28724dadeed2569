"""What the kernels of ``weight_gradient`` are handed: the address of 64-bit slots."""

import struct

# bfloat16: (N, H, W, C) and (N, OH, OW, O); float32: (O, KH, KW, C)
X, GRAD, DWEIGHT = range(3)
# sizes of the images, channels of the output, of the kernel, and the zeros around an image on each side
IMAGES, CHANNELS, HEIGHT, WIDTH, OUT_CHANNELS = range(3, 8)
KERNEL_HEIGHT, KERNEL_WIDTH, PAD_HEIGHT, PAD_WIDTH = range(8, 12)
# working memory, the bytes of it that each part has, and the number of parts
SCRATCH, SCRATCH_STEP, PARTS = range(12, 15)

PIXELS = 96  # of the output whose gradients are laid out at a time, to stay in the first cache

_PACKER = struct.Struct("=15q")


def pack(*values: int) -> bytes:
    """The slots as bytes, in the order above."""
    return _PACKER.pack(*values)
