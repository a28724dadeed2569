"""What the kernel of ``patches`` is handed: the address of these 64-bit slots."""

import struct

# tensors in the storage type: (N, OH, OW, KH, KW, C) and (N, H, W, C)
COLUMNS, IMAGE = 0, 1
# sizes of the images, of the kernel, and the zeros around an image on each side
IMAGES, CHANNELS, HEIGHT, WIDTH, KERNEL_HEIGHT, KERNEL_WIDTH, PAD_HEIGHT, PAD_WIDTH = range(2, 10)
# working memory, the bytes of it that each part has, and the number of parts
SCRATCH, SCRATCH_STEP, PARTS = range(10, 13)

_PACKER = struct.Struct("=13q")


def pack(*values: int) -> bytes:
    """The slots as bytes, in the order above."""
    return _PACKER.pack(*values)
