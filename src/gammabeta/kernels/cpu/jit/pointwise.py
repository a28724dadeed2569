"""What happens to one value forward, on sixteen lanes: the same in both layouts."""

from .simd import fma, inlined


def forward(storage, activation, residual):
    """``activation((x - mean) * scale + bias + residual)`` for whole vectors and for ``count`` lanes."""
    load, load_some, activate = storage.load, storage.load_some, activation.forward

    @inlined
    def one(x, res, at, mean, scale, bias):
        z = fma(load(x, at) - mean, scale, bias)
        if residual:
            z = z + load(res, at)
        return activate(z)

    @inlined
    def one_some(x, res, at, count, mean, scale, bias):
        z = fma(load_some(x, at, count) - mean, scale, bias)
        if residual:
            z = z + load_some(res, at, count)
        return activate(z)

    return one, one_some
