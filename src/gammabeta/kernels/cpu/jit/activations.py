"""The activations on sixteen lanes: ``forward(z)``, and ``backward(z, g)``: ``g`` times the derivative at z.

At a kink, and for NaN, they agree with PyTorch. ``exp`` and ``erf`` are approximations fitted for float32
(relative error below 4e-7), because LLVM has no vector form of either.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from ....epilogue import require_arithmetic
from .simd import absolute, fma, inlined, power_of_two, select, splat


@inlined
def exp(x):
    """Exponential: ``2**n`` times a polynomial in the rest, at most half of ``log 2``; infinite from 88.4."""
    shift = splat(12582912.0)  # 1.5 * 2**23: adding it rounds to a whole number
    x = select(x > splat(89.0), splat(89.0), select(x < splat(-87.0), splat(-87.0), x))
    shifted = fma(x, splat(1.4426950408889634), shift)
    n = shifted - shift
    rest = fma(n, splat(-0.693145751953125), x)
    rest = fma(n, splat(-1.428606765330187e-06), rest)
    p = fma(splat(0.0013751407386735082), rest, splat(0.008368915878236294))
    p = fma(p, rest, splat(0.04166953265666962))
    p = fma(p, rest, splat(0.166665181517601))
    p = fma(p, rest, splat(0.49999988079071045))
    p = fma(p, rest * rest, rest)
    return (p + splat(1.0)) * power_of_two(shifted)


@inlined
def erf(x):
    """Error function: an odd rational function of x, exactly ±1 from 3.92 on."""
    size = absolute(x)
    one = splat(1.0)
    t = x * x
    p = fma(splat(-1.279931449715832e-08), t, splat(4.609133611666039e-06))
    p = fma(p, t, splat(0.0003767558082472533))
    p = fma(p, t, splat(0.003838636912405491))
    p = fma(p, t, splat(0.05424398183822632))
    p = fma(p, t, splat(0.18513590097427368))
    p = fma(p, t, splat(1.128379225730896))
    q = fma(splat(6.239823414944112e-05), t, splat(0.0013015236472710967))
    q = fma(q, t, splat(0.015430064871907234))
    q = fma(q, t, splat(0.1138739362359047))
    q = fma(q, t, splat(0.4974058270454407))
    q = fma(q, t, one)
    limit = select(x > splat(0.0), one, splat(-1.0))
    return select(size >= splat(3.92), limit, x * p / q)


@inlined
def sigmoid(z):
    """``1 / (1 + exp(-z))``."""
    return splat(1.0) / (splat(1.0) + exp(splat(0.0) - z))


@inlined
def normal_cdf(z):
    """``(1 + erf(z / √2)) / 2``."""
    return fma(splat(0.5), erf(z * splat(0.7071067811865476)), splat(0.5))


@inlined
def identity(z):
    """No activation."""
    return z


@inlined
def identity_backward(z, g):
    """No activation."""
    return g


@inlined
def relu(z):
    """``max(z, 0)``, NaN kept."""
    return select(z <= splat(0.0), splat(0.0), z)


@inlined
def relu_backward(z, g):
    """0 at 0."""
    return select(z <= splat(0.0), splat(0.0), g)


@inlined
def relu6(z):
    """``min(max(z, 0), 6)``, NaN kept."""
    return select(z <= splat(0.0), splat(0.0), select(z >= splat(6.0), splat(6.0), z))


@inlined
def relu6_backward(z, g):
    """0 at 0 and at 6."""
    return select((z <= splat(0.0)) | (z >= splat(6.0)), splat(0.0), g)


@inlined
def leaky_relu(z):
    """Slope 0.01 below zero."""
    return select(z > splat(0.0), z, z * splat(0.01))


@inlined
def leaky_relu_backward(z, g):
    """0.01 at 0."""
    return select(z > splat(0.0), g, g * splat(0.01))


@inlined
def silu(z):
    """``z * sigmoid(z)``."""
    return z * sigmoid(z)


@inlined
def silu_backward(z, g):
    """``sigmoid(z) * (1 + z * (1 - sigmoid(z)))``."""
    s = sigmoid(z)
    return g * s * fma(z, splat(1.0) - s, splat(1.0))


@inlined
def hardswish(z):
    """``z * relu6(z + 3) / 6``."""
    return z * relu6(z + splat(3.0)) * splat(1.0 / 6.0)


@inlined
def hardswish_backward(z, g):
    """0 at -3, 1 at 3."""
    inner = select(z < splat(3.0), g * fma(z, splat(1.0 / 3.0), splat(0.5)), g)
    return select(z <= splat(-3.0), splat(0.0), inner)


@inlined
def gelu(z):
    """``z * normal_cdf(z)``, the exact form."""
    return z * normal_cdf(z)


@inlined
def gelu_backward(z, g):
    """``normal_cdf(z) + z * normal_pdf(z)``."""
    density = splat(0.3989422804014327) * exp(z * z * splat(-0.5))
    return g * fma(z, density, normal_cdf(z))


class Activation(NamedTuple):
    """An activation and its derivative times an upstream gradient."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


ACTIVATIONS = {
    None: Activation(identity, identity_backward),
    "relu": Activation(relu, relu_backward),
    "relu6": Activation(relu6, relu6_backward),
    "leaky_relu": Activation(leaky_relu, leaky_relu_backward),
    "silu": Activation(silu, silu_backward),
    "hardswish": Activation(hardswish, hardswish_backward),
    "gelu": Activation(gelu, gelu_backward),
}

require_arithmetic("cpu", {name for name in ACTIVATIONS if name})
