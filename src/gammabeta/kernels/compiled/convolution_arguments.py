"""What the kernel of ``convolution`` is handed: the address of these 64-bit slots."""

import struct

# tensors in the storage type: (N, OH, OW, O), (O, KH, KW, C) and (N, H, W, C)
GRAD, WEIGHT, DX = range(3)
# sizes of the images, channels of the output, of the kernel, and the zeros around an image on each side
IMAGES, CHANNELS, HEIGHT, WIDTH, OUT_CHANNELS = range(3, 8)
KERNEL_HEIGHT, KERNEL_WIDTH, PAD_HEIGHT, PAD_WIDTH = range(8, 12)
# working memory, the bytes of it that each part has, and the number of parts
SCRATCH, SCRATCH_STEP, PARTS = range(12, 15)

PIXELS = 6  # of the output that a tile takes at a time
GROUP = 24  # pixels whose patches are held before they are added up
COLUMNS = 64  # of the patches that a tile takes at a time

_PACKER = struct.Struct("=15q")


def pack(*values: int) -> bytes:
    """The slots as bytes, in the order above."""
    return _PACKER.pack(*values)
