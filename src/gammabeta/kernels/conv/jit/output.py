"""What turns rows of z, a row of whole vectors for each pixel, into the output of a convolution's layer."""

from ...cpu.jit.loads import float32
from ...cpu.jit.simd import inlined, splat

_load = float32.load


def writer(storage, activation, pool, lanes):
    """Return ``write(z, pitch, target, width, outs, v, some)`` for z of ``lanes`` float32 channels a pixel.

    It writes ``width`` output pixels of ``outs`` channels, ``some`` of them from channel v on, at most
    sixteen: z activated, or its mean over 2x2 windows, the lower row ``pitch`` values behind the upper.
    """
    act, store, store_some = activation.forward, storage.store, storage.store_some

    @inlined
    def finished(z, pitch, pixel, v):
        if not pool:
            return act(_load(z, pixel * lanes + v))
        left, right = 2 * pixel * lanes + v, (2 * pixel + 1) * lanes + v
        upper = act(_load(z, left)) + act(_load(z, right))
        lower = act(_load(z, pitch + left)) + act(_load(z, pitch + right))
        return (upper + lower) * splat(0.25)

    @inlined
    def write(z, pitch, target, width, outs, v, some):
        if some == 16:
            for pixel in range(width):
                store(target, pixel * outs + v, finished(z, pitch, pixel, v))
        else:
            for pixel in range(width):
                store_some(target, pixel * outs + v, finished(z, pitch, pixel, v), some)

    return write
