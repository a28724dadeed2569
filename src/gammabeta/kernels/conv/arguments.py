"""What the kernels of convolutions are handed: three records of 64-bit fields (``cpu.arguments``).

A field that holds an address is 0 where the tensor is absent. Beside them stand the sizes of tiles, which
host and kernel both know.
"""

from typing import NamedTuple

#: Rows of a tile whose rows are 1, 2, 3 and 4 vectors: its sums fill the 32 vector registers of AVX-512.
ROWS = (9, 9, 5, 5)

# The gradient at the input
PIXELS = 6  # of the output that a tile takes at a time
GROUP = 24  # pixels whose patches are held before they are added up
COLUMNS = 64  # of the patches that a tile takes at a time

LAID_OUT = 96  # pixels whose gradients lie side by side for the weight's, to stay in the first cache


class GradientArguments(NamedTuple):
    """The gradients of a convolution; ``weight`` or ``x`` is the gradient that is asked for."""

    grad: int = 0  # (N, OH, OW, O): at the output
    weight: int = 0  # (O, KH, KW, C)
    x: int = 0  # (N, H, W, C)
    images: int = 0
    channels: int = 0
    height: int = 0
    width: int = 0
    out_channels: int = 0
    kernel_height: int = 0
    kernel_width: int = 0
    pad_height: int = 0  # zeros around an image on each side
    pad_width: int = 0
    scratch: int = 0  # working memory
    scratch_step: int = 0  # the bytes of it that each part has
    parts: int = 0


class StemArguments(NamedTuple):
    """A first convolution and batch norm, for K = C·KH·KW values in a patch and O channels in V vectors."""

    x: int = 0  # float32 (N, C, H, W), contiguous
    weight: int = 0  # float32 (O, C, KH, KW)
    scaled: int = 0  # float32 (K + 1, 16 V): the weight with the normalisation in it, then the constants
    grad: int = 0  # at the output, in the storage type, channels_last
    dweight: int = 0
    # (O,) float32; the mean is without the convolution's bias
    mean: int = 0
    var: int = 0
    invstd: int = 0
    gamma: int = 0
    beta: int = 0
    dgamma: int = 0
    dbeta: int = 0
    # float64: the mean patch (K,); for each channel, the covariance of its output with the patch (O, K)
    patch_mean: int = 0
    covariance: int = 0
    # float64, of each part: sums of patches (K,) and of their products (K, K); or of gradients (K + 1, 16 V)
    sums: int = 0
    scratch: int = 0  # working memory
    scratch_step: int = 0  # the bytes of it that each part has
    images: int = 0
    channels: int = 0
    height: int = 0
    width: int = 0
    out_channels: int = 0
    kernel_height: int = 0
    kernel_width: int = 0
    parts: int = 0
    eps: float = 0.0


class ServingArguments(NamedTuple):
    """A convolution for serving, for K values in a patch and V vectors in a block of channels."""

    x: int = 0  # float32
    weight: int = 0  # float32, in blocks (K, 16 V)
    bias: int = 0  # float32 (O,), or 0
    out: int = 0  # in the storage type, channels_last
    taps: int = 0  # int64 (K,): how far each value of a patch lies from its first, in bytes
    scratch: int = 0  # working memory
    # of the input, in bytes: from an image to the next, from a patch to the one below, to the one beside it
    image_step: int = 0
    row_step: int = 0
    pixel_step: int = 0
    values: int = 0  # K
    blocks: int = 0
    # of the output
    images: int = 0
    height: int = 0
    width: int = 0
    out_channels: int = 0
    band: int = 0  # output rows done at once
    bands: int = 0  # in an image
    scratch_step: int = 0  # the bytes of working memory that each part has
    parts: int = 0
    # Of an image with zeros around it, in values: a row without them, a row with them (0: there are none),
    # the zeros to the left; in rows: the image, the zeros above it, what a band reads.
    in_row: int = 0
    sheet_row: int = 0
    left: int = 0
    in_height: int = 0
    top: int = 0
    reach: int = 0
