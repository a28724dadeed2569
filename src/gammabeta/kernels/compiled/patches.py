"""Patches added up into the images they were taken from: the adjoint of im2col, for channels_last images.

``image[y, x] = Σ columns[oy, ox, ky, kx]`` over all ``oy + ky = y + pad`` and ``ox + kx = x + pad``, each
term C values. What a patch holds of one row of the kernel is KW·C values side by side, and so is where they
go: vectors are full at any C. Patches are read once, in the order of memory, and added in float32 in an
image of working memory that stays in the core's cache. Memory moved: columns read 1, image written 1.
"""

from .patch_arguments import (
    CHANNELS,
    COLUMNS,
    HEIGHT,
    IMAGE,
    IMAGES,
    KERNEL_HEIGHT,
    KERNEL_WIDTH,
    PAD_HEIGHT,
    PAD_WIDTH,
    PARTS,
    SCRATCH,
    SCRATCH_STEP,
    WIDTH,
)
from .simd import float32, get_i64, inlined
from .tables import clear, cut

_load, _store = float32.load, float32.store
_load_some, _store_some = float32.load_some, float32.store_some


def add_patches(storage, activation, residual, pool):
    """A part is a run of images; the order of additions is the same however they are cut."""
    load, load_some = storage.load, storage.load_some
    store, store_some, size = storage.store, storage.store_some, storage.size

    @inlined
    def add(source, target, count):
        """``target[i] += source[i]``."""
        at = 0
        while at + 64 <= count:
            _store(target, at, _load(target, at) + load(source, at))
            _store(target, at + 16, _load(target, at + 16) + load(source, at + 16))
            _store(target, at + 32, _load(target, at + 32) + load(source, at + 32))
            _store(target, at + 48, _load(target, at + 48) + load(source, at + 48))
            at += 64
        while at < count:
            some = min(16, count - at)
            _store_some(target, at, _load_some(target, at, some) + load_some(source, at, some), some)
            at += 16

    @inlined
    def copy(source, target, count):
        """``target[i] = source[i]`` in the storage type."""
        at = 0
        while at + 16 <= count:
            store(target, at, _load(source, at))
            at += 16
        if at < count:
            store_some(target, at, _load_some(source, at, count - at), count - at)

    def kernel(args, part):
        channels, height, width = get_i64(args, CHANNELS), get_i64(args, HEIGHT), get_i64(args, WIDTH)
        kernel_height, kernel_width = get_i64(args, KERNEL_HEIGHT), get_i64(args, KERNEL_WIDTH)
        pad_height, pad_width = get_i64(args, PAD_HEIGHT), get_i64(args, PAD_WIDTH)
        padded = width + 2 * pad_width
        out_height, out_width = height + 2 * pad_height - kernel_height + 1, padded - kernel_width + 1
        line = kernel_width * channels
        sheet = get_i64(args, SCRATCH) + part * get_i64(args, SCRATCH_STEP)
        images, parts = get_i64(args, IMAGES), get_i64(args, PARTS)
        for image in range(cut(images, parts, part), cut(images, parts, part + 1)):
            clear(sheet, get_i64(args, SCRATCH_STEP) // 4)
            source = get_i64(args, COLUMNS) + image * out_height * out_width * kernel_height * line * size
            for oy in range(out_height):
                for ox in range(out_width):
                    for ky in range(kernel_height):
                        add(source, sheet + ((oy + ky) * padded + ox) * channels * 4, line)
                        source += line * size
            target = get_i64(args, IMAGE) + image * height * width * channels * size
            for y in range(height):
                first = sheet + ((y + pad_height) * padded + pad_width) * channels * 4
                copy(first, target + y * width * channels * size, width * channels)

    return kernel
