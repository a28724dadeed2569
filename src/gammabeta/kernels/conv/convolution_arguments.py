"""What the kernels of a convolution's gradients are handed: the address of these 64-bit slots."""

import struct

# the gradient at the output (N, OH, OW, O); the weight (O, KH, KW, C) and the input (N, H, W, C), one of
# which is the gradient that is asked for
GRAD, WEIGHT, X = range(3)
# sizes of the images, channels of the output, of the kernel, and the zeros around an image on each side
IMAGES, CHANNELS, HEIGHT, WIDTH, OUT_CHANNELS = range(3, 8)
KERNEL_HEIGHT, KERNEL_WIDTH, PAD_HEIGHT, PAD_WIDTH = range(8, 12)
# working memory, the bytes of it that each part has, and the number of parts
SCRATCH, SCRATCH_STEP, PARTS = range(12, 15)

PIXELS = 6  # of the output that a tile takes at a time
GROUP = 24  # pixels whose patches are held before they are added up
COLUMNS = 64  # of the patches that a tile takes at a time
LAID_OUT = 96  # pixels whose gradients lie side by side for the weight's, to stay in the first cache

_PACKER = struct.Struct("=15q")


def pack(*values: int) -> bytes:
    """The slots as bytes, in the order above."""
    return _PACKER.pack(*values)
