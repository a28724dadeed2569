"""What every GPU kernel is built from: where a tile lies in memory, the activations, their derivatives.

A kernel works on tiles of ``BC`` channels by ``BN * BS`` cells. A cell is one position of one image or, where
a 2 x 2 pool follows, the four positions under one pooled value (``POOL`` is 1 or 2). Tiles are numbered ``q =
group * chunks + chunk``: a group of ``BN`` images, a chunk of ``BS`` cells of each. The tensor is either
``(N, C, S)`` with ``S`` contiguous or, with ``ROWS``, ``(N, S, C)`` with ``C`` contiguous (channels_last).

Offsets: the tile's first element is one 64-bit number, so tensors may pass 2^31 elements; inside a tile
offsets are 32-bit unless the tile alone spans more (``WIDE``). ``VEC`` divides the contiguous extent:
multiplying by it where the extent enters tells the compiler how many neighbouring values one load may fetch.
"""

import triton
import triton.language as tl

from ...epilogue import require_arithmetic

SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
LEAKY_SLOPE = tl.constexpr(0.01)
SIXTH = tl.constexpr(1.0 / 6.0)


# What the two functions below compute.
require_arithmetic("gpu", {
    "relu", "relu6", "leaky_relu", "silu", "hardswish", "gelu", "mish", "tanh", "sigmoid", "hardsigmoid",
    "gelu_tanh", "elu", "hardtanh",
})  # fmt: skip


@triton.jit
def tanh(z):
    """Hyperbolic tangent: an odd polynomial near 0, else from ``exp(2|z|)``."""
    size = tl.abs(z)
    t = z * z
    p = ((-0.006053697317838669 * t + 0.020968187600374222) * t - 0.053844988346099854) * t
    near = z + z * t * ((p + 0.13332733511924744) * t - 0.333333283662796)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.625, near, tl.where(z < 0.0, -far, far))


@triton.jit
def expm1(z):
    """``exp(z) - 1`` for z up to 0: its power series near 0."""
    p = ((z * (1.0 / 5040.0) + 1.0 / 720.0) * z + 1.0 / 120.0) * z + 1.0 / 24.0
    near = z + z * z * ((p * z + SIXTH) * z + 0.5)
    return tl.where(z > -0.5, near, tl.exp(z) - 1.0)


@triton.jit
def bounded_exp(z):
    """``e = exp(z)`` up to z = 20. With ``n = e (e + 2)``, ``tanh(log(1 + e))`` is ``n / (n + 2)``."""
    return tl.exp(tl.where(z > 20.0, 20.0, z))


@triton.jit
def tanh_form(z):
    """``σ(2u)`` with ``u = √(2/π) (z + 0.044715 z³)``."""
    return tl.sigmoid(z * (1.5957691216057308 + 0.07135481627260025 * z * z))


@triton.jit
def activate(z, ACT: tl.constexpr):
    """The activation of ``z``, float32. Comparisons are written so that NaN passes through, as torch's do."""
    if ACT == "relu":
        z = tl.where(z <= 0.0, 0.0, z)
    elif ACT == "relu6":
        z = tl.where(z <= 0.0, 0.0, tl.where(z >= 6.0, 6.0, z))
    elif ACT == "leaky_relu":
        z = tl.where(z <= 0.0, z * LEAKY_SLOPE, z)
    elif ACT == "silu":
        z = z * tl.sigmoid(z)
    elif ACT == "hardswish":
        z = tl.where(z <= -3.0, 0.0, tl.where(z >= 3.0, z, z * (z + 3.0) * (1.0 / 6.0)))
    elif ACT == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * SQRT_HALF))
    elif ACT == "mish":
        e = bounded_exp(z)
        n = e * (e + 2.0)
        z = z * (n / (n + 2.0))
    elif ACT == "tanh":
        z = tanh(z)
    elif ACT == "sigmoid":
        z = tl.sigmoid(z)
    elif ACT == "hardsigmoid":
        z = tl.where(z <= -3.0, 0.0, tl.where(z >= 3.0, 1.0, (z + 3.0) * SIXTH))
    elif ACT == "gelu_tanh":
        z = z * tanh_form(z)
    elif ACT == "elu":
        z = tl.where(z > 0.0, z, expm1(z))
    elif ACT == "hardtanh":
        z = tl.where(z <= -1.0, -1.0, tl.where(z >= 1.0, 1.0, z))
    else:
        tl.static_assert(ACT is None, "this activation has no arithmetic here")
    return z


@triton.jit
def activate_backward(g, z, ACT: tl.constexpr):
    """``g`` times the activation's derivative at ``z``, float32."""
    if ACT == "relu":
        g = tl.where(z <= 0.0, 0.0, g)
    elif ACT == "relu6":
        g = tl.where((z <= 0.0) | (z >= 6.0), 0.0, g)
    elif ACT == "leaky_relu":
        g = tl.where(z <= 0.0, g * LEAKY_SLOPE, g)
    elif ACT == "silu":
        s = tl.sigmoid(z)
        g = g * s * (1.0 + z * (1.0 - s))
    elif ACT == "hardswish":
        g = tl.where(z <= -3.0, 0.0, tl.where(z >= 3.0, g, g * (z * (1.0 / 3.0) + 0.5)))
    elif ACT == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(z * SQRT_HALF))
        g = g * (cdf + z * INV_SQRT_2PI * tl.exp(-0.5 * z * z))
    elif ACT == "mish":
        e = bounded_exp(z)
        n = e * (e + 2.0)
        g = g * (n / (n + 2.0) + z * (4.0 * e * (e + 1.0) / ((n + 2.0) * (n + 2.0))))
    elif ACT == "tanh":
        t = tanh(z)
        g = g * (1.0 - t * t)
    elif ACT == "sigmoid":
        s = tl.sigmoid(z)
        g = g * s * (1.0 - s)
    elif ACT == "hardsigmoid":
        g = tl.where((z > -3.0) & (z < 3.0), g * SIXTH, 0.0)
    elif ACT == "gelu_tanh":
        s = tanh_form(z)
        g = g * s * (1.0 + z * (1.5957691216057308 + 0.21406444881780075 * z * z) * (1.0 - s))
    elif ACT == "elu":
        g = tl.where(z <= 0.0, g * tl.exp(z), g)
    elif ACT == "hardtanh":
        g = tl.where((z <= -1.0) | (z >= 1.0), 0.0, g)
    else:
        tl.static_assert(ACT is None, "this activation has no arithmetic here")
    return g


@triton.jit
def extents(C, S, cells, VEC: tl.constexpr, ROWS: tl.constexpr, POOL: tl.constexpr):
    """``(C, S, cells)``, where ``VEC`` visibly divides the contiguous one; no pool: cells are S."""
    if ROWS:
        C = (C // VEC) * VEC
    else:
        S = (S // VEC) * VEC
    if POOL == 1:
        cells = S
    return C, S, cells


@triton.jit
def pieces(extent, size: tl.constexpr):
    """``extent / size`` rounded up, for a positive extent however near to 2^31."""
    return (extent - 1) // size + 1


@triton.jit
def tile_count(N, cells, BN: tl.constexpr, BS: tl.constexpr):
    """How many tiles cover ``N`` images of ``cells`` cells."""
    return pieces(N, BN) * pieces(cells, BS)


@triton.jit
def tile_extent(q, N, cells, BN: tl.constexpr, BS: tl.constexpr):
    """How many cells of tile ``q`` exist, per channel."""
    chunks = pieces(cells, BS)
    group = q // chunks
    return tl.minimum(BN, N - group * BN) * tl.minimum(BS, cells - (q - group * chunks) * BS)


@triton.jit
def locate(
    q, c0, corner, N, C, S, H, W, cells, cols,
    POOL: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
    BC: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Where tile ``q`` of channels ``c0...`` lies: start, and offsets and mask, ``(BC, BN * BS)``.

    With ``POOL == 2`` a cell has four corners and ``corner`` (0 to 3) picks one, or None: the pooled value,
    in its own tensor of ``H // 2`` by ``W // 2``. ``cols`` is the number of cells in a row of them. Cells at
    an odd edge lack corners: the mask leaves them out.
    """
    chunks = pieces(cells, BS)
    group = q // chunks
    s0 = (q - group * chunks) * BS
    r = tl.arange(0, BN * BS)
    n = r // BS
    s = r % BS
    c = tl.arange(0, BC)
    inside = (n < N - group * BN) & (s < cells - s0)
    if POOL == 2:
        y = (s0 + s) // cols
        x = (s0 + s) - y * cols
        if corner is None:
            H = H // 2
            W = W // 2
            S = H * W
        else:
            y = 2 * y + corner // 2
            x = 2 * x + corner % 2
        inside = inside & (y < H) & (x < W)
        if WIDE:
            y = y.to(tl.int64)
        position = y * W + x
    else:
        position = s
    mask = (c0 + c < C)[:, None] & inside[None, :]
    if WIDE:
        c = c.to(tl.int64)
        n = n.to(tl.int64)
        position = position.to(tl.int64)
    start = (group * BN).to(tl.int64) * C * S
    if POOL == 1:
        start += s0.to(tl.int64) * C if ROWS else s0
    if ROWS:
        start += c0
        offsets = c[:, None] + (n * C * S + position * C)[None, :]
    else:
        start += c0.to(tl.int64) * S
        offsets = c[:, None] * S + (n * C * S + position)[None, :]
    return start, offsets, mask


@triton.jit
def load_affine(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, c0, C, BC: tl.constexpr):
    """``(mean, invstd, scale, bias)`` from ``c0``, each ``(BC, 1)``: ``z = (x - mean) * scale + bias``."""
    c = c0 + tl.arange(0, BC)
    mean = tl.load(mean_ptr + c, mask=c < C, other=0.0)
    invstd = tl.load(invstd_ptr + c, mask=c < C, other=0.0)
    scale, bias = load_scale_bias(weight_ptr, bias_ptr, invstd, c0, C, BC)
    return mean[:, None], invstd[:, None], scale[:, None], bias[:, None]


@triton.jit
def load_scale_bias(weight_ptr, bias_ptr, invstd, c0, C, BC: tl.constexpr):
    """``weight * invstd`` and ``bias``, each ``(BC,)``; a missing weight counts as 1, a missing bias as 0."""
    c = c0 + tl.arange(0, BC)
    scale = invstd
    if weight_ptr is not None:
        scale = tl.load(weight_ptr + c, mask=c < C, other=0.0) * invstd
    bias = tl.zeros_like(invstd)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=c < C, other=0.0)
    return scale, bias
