"""The activations on sixteen lanes: ``forward(z)``, and ``backward(z, g)``: ``g`` times the derivative at z.

At a kink, and for NaN, they agree with PyTorch. ``exp`` and ``erf`` are approximations fitted for float32
(relative error below 4e-7), because LLVM has no vector form of either.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from .simd import absolute, fma, inlined, power_of_two, select, splat


@inlined
def _split(x):
    """``(p, 2**n)`` with ``exp(x) = (1 + p) * 2**n``: a polynomial in the rest, at most half of ``log 2``."""
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
    return fma(p, rest * rest, rest), power_of_two(shifted)


@inlined
def exp(x):
    """Exponential; infinite from 88.4."""
    p, scale = _split(x)
    return (p + splat(1.0)) * scale


@inlined
def expm1(x):
    """``exp(x) - 1``, as exact near 0."""
    p, scale = _split(x)
    return fma(p, scale, scale - splat(1.0))


@inlined
def tanh(x):
    """Hyperbolic tangent: an odd polynomial near 0, else from ``exp(2|x|)``."""
    size = absolute(x)
    one = splat(1.0)
    t = x * x
    p = fma(splat(-0.006053697317838669), t, splat(0.020968187600374222))
    p = fma(p, t, splat(-0.053844988346099854))
    p = fma(p, t, splat(0.13332733511924744))
    p = fma(p, t, splat(-0.333333283662796))
    far = one - splat(2.0) / (exp(size + size) + one)
    return select(size < splat(0.625), fma(x * t, p, x), select(x < splat(0.0), splat(0.0) - far, far))


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
    return z * hardsigmoid(z)


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


@inlined
def mish(z):
    """``z * tanh(log(1 + e))``, ``e = exp(z)``: with ``n = e (e + 2)`` the tanh is ``n / (n + 2)``."""
    e = _bounded_exp(z)
    n = e * (e + splat(2.0))
    return z * (n / (n + splat(2.0)))


@inlined
def mish_backward(z, g):
    """The tanh, and z times its own derivative, ``4 e (e + 1) / (n + 2)**2``."""
    e = _bounded_exp(z)
    n = e * (e + splat(2.0))
    whole = n + splat(2.0)
    slope = splat(4.0) * e * (e + splat(1.0)) / (whole * whole)
    return g * fma(z, slope, n / whole)


@inlined
def _bounded_exp(z):
    """``exp(z)`` up to z = 20, where the tanh is 1, and 0 far below 0."""
    e = exp(select(z > splat(20.0), splat(20.0), z))
    return select(z < splat(-87.0), splat(0.0), e)


@inlined
def tanh_backward(z, g):
    """``1 - tanh(z)**2``."""
    t = tanh(z)
    return g * (splat(1.0) - t * t)


@inlined
def sigmoid_backward(z, g):
    """``sigmoid(z) * (1 - sigmoid(z))``."""
    s = sigmoid(z)
    return g * s * (splat(1.0) - s)


@inlined
def hardsigmoid(z):
    """``relu6(z + 3) / 6``."""
    z = z + splat(3.0)
    return select(z <= splat(0.0), splat(0.0), select(z >= splat(6.0), splat(1.0), z * splat(1.0 / 6.0)))


@inlined
def hardsigmoid_backward(z, g):
    """0 at -3, at 3 and for NaN."""
    return select((z > splat(-3.0)) & (z < splat(3.0)), g * splat(1.0 / 6.0), splat(0.0))


@inlined
def _tanh_form(z):
    """``σ(2u)`` with ``u = √(2/π) (z + 0.044715 z³)``."""
    return sigmoid(z * fma(z * z, splat(0.07135481627260025), splat(1.5957691216057308)))


@inlined
def gelu_tanh(z):
    """``z * sigmoid(2u)``, as ``1 + tanh(u)`` is ``2 * sigmoid(2u)``."""
    return z * _tanh_form(z)


@inlined
def gelu_tanh_backward(z, g):
    """``s + z * s * (1 - s) * 2u'``."""
    s = _tanh_form(z)
    slope = fma(z * z, splat(0.21406444881780075), splat(1.5957691216057308))
    return g * s * fma(z * slope, splat(1.0) - s, splat(1.0))


class Activation(NamedTuple):
    """An activation and its derivative times an upstream gradient; both take a slope if that is learned."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    learned: bool = False


# --- with a slope that is learned (PReLU) -----------------------------------------------------------------


@inlined
def prelu(z, slope):
    """``z`` above zero, ``slope * z`` elsewhere."""
    return select(z > splat(0.0), z, z * slope)


@inlined
def prelu_backward(z, g, slope):
    """The slope at 0."""
    return select(z > splat(0.0), g, g * slope)


@inlined
def below_backward(z, g):
    """What the slope is multiplied by: the gradient where z is not above zero."""
    return select(z > splat(0.0), splat(0.0), g)


_LEARNED = {
    "prelu": Activation(prelu, prelu_backward, learned=True),
    "below": Activation(identity, below_backward),
}

# --- with numbers: constants of the kernel that is made ---------------------------------------------------


def _leaky_relu(slope):
    @inlined
    def forward(z):
        return select(z > splat(0.0), z, z * splat(slope))

    @inlined
    def backward(z, g):  # the slope at 0
        return select(z > splat(0.0), g, g * splat(slope))

    return Activation(forward, backward)


def _elu(alpha):
    @inlined
    def forward(z):
        return select(z > splat(0.0), z, expm1(z) * splat(alpha))

    @inlined
    def backward(z, g):  # alpha at 0
        return select(z <= splat(0.0), g * exp(z) * splat(alpha), g)

    return Activation(forward, backward)


def _hardtanh(low, high):
    @inlined
    def forward(z):
        return select(z <= splat(low), splat(low), select(z >= splat(high), splat(high), z))

    @inlined
    def backward(z, g):  # 0 at both corners
        return select((z <= splat(low)) | (z >= splat(high)), splat(0.0), g)

    return Activation(forward, backward)


_WITH_NUMBERS: dict[str, Any] = {"leaky_relu": _leaky_relu, "elu": _elu, "hardtanh": _hardtanh}

ACTIVATIONS = {
    None: Activation(identity, identity_backward),
    "relu": Activation(relu, relu_backward),
    "relu6": _hardtanh(0.0, 6.0),
    "leaky_relu": _leaky_relu(0.01),
    "silu": Activation(silu, silu_backward),
    "hardswish": Activation(hardswish, hardswish_backward),
    "gelu": Activation(gelu, gelu_backward),
    "mish": Activation(mish, mish_backward),
    "tanh": Activation(tanh, tanh_backward),
    "sigmoid": Activation(sigmoid, sigmoid_backward),
    "hardsigmoid": Activation(hardsigmoid, hardsigmoid_backward),
    "gelu_tanh": Activation(gelu_tanh, gelu_tanh_backward),
    "elu": _elu(1.0),
    "hardtanh": _hardtanh(-1.0, 1.0),
}
if "gammabeta.epilogue" in sys.modules:  # not where another process only has kernels compiled, and not torch
    from ....epilogue import require_arithmetic

    require_arithmetic("cpu", {name for name in ACTIVATIONS if name})


def arithmetic_of(name: str | None) -> Activation:
    """The arithmetic of an activation, or of None; one with numbers is made."""
    if name is None or name in ACTIVATIONS:
        return ACTIVATIONS[name]
    if name in _LEARNED:
        return _LEARNED[name]
    from ....epilogue import split

    base, numbers = split(name)
    made: Activation = _WITH_NUMBERS[base](*numbers)
    return made
