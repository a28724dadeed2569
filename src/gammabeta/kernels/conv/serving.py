"""A convolution, an activation and a 2x2 mean as one, from weights laid out beforehand; AVX-512 on a CPU.

A call of oneDNN through torch costs 20 µs, and writes what is pooled next. This one costs a quarter of that,
and writes the result alone.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...epilogue import ACTIVATIONS
from ..cpu.arguments import packer
from ..cpu.launch import Step, run
from ..cpu.registry import Key
from .arguments import ROWS, ServingArguments

_BAND = 1 << 14  # bytes of sums in a band: they stay in the first cache. Measured.
_MOST_VECTORS = 4  # in a block of channels
_pack = packer(ServingArguments)


class Layer(NamedTuple):
    """A convolution and what follows it."""

    kernel: tuple[int, int, int, int]  # (O, C, KH, KW)
    padding: tuple[int, int]  # zeros above and below an image, and to its left and right
    stride: tuple[int, int]
    dilation: tuple[int, int]
    activation: str | None
    pool: bool  # whether the mean over 2x2 windows follows; a last odd row or column is not computed
    dtype: torch.dtype = torch.float32  # of the output; float32 or bfloat16
    channel_first: bool = False  # the values of a patch are summed in the order C, KH, KW; else KH, KW, C


def unsupported(activation: str | None) -> str | None:
    """Why there is no kernel on this machine or for this activation, None if there is."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "the kernel's tiles need the 32 vector registers of AVX-512"
    known = activation is None or activation in ACTIVATIONS
    return None if known else f"no kernel has the activation {activation!r}"


def lay_out(weight: Tensor) -> Tensor:
    """Copy a float32 weight ``(O, C, KH, KW)`` into blocks of V vectors of channels: (B, KH·KW·C, 16 V)."""
    outs = len(weight)
    vectors = min(-(-outs // 16), _MOST_VECTORS)
    blocks = -(-outs // (16 * vectors))
    rows = weight.new_zeros(weight[0].numel(), 16 * vectors * blocks)
    rows[:, :outs] = weight.permute(2, 3, 1, 0).reshape(-1, outs)
    laid_out: Tensor = rows.unflatten(1, (blocks, -1)).transpose(0, 1).contiguous()
    return laid_out


class Plan(NamedTuple):
    """How inputs of one shape and layout are convolved."""

    shape: tuple[int, int, int, int]  # of the output
    dtype: torch.dtype
    taps: Tensor  # (K,) int64: how far the values of a patch lie from its first, in bytes
    sizes: dict[str, float]  # the fields of ``ServingArguments``, all but the tensors' set
    nbytes: int  # of working memory
    parts: int
    steps: tuple[Step, ...]


@lru_cache(1024)
def plan_of(images: torch.Size, strides: tuple[int, ...], layer: Layer, threads: int) -> Plan:
    """Plan for inputs ``(N, C, H, W)`` that with the padding are at least as large as the kernel.

    Args:
        images: The shape of the input.
        strides: Its strides, in elements; any without padding, else those of channels_last.
        layer: What follows what.
        threads: How many there are.
    """
    outs, channels, *window = layer.kernel
    each = 2 if layer.pool else 1
    around = layer.padding != (0, 0)  # zeros, in a copy of the rows that a band reads
    row = (images[3] + 2 * layer.padding[1]) * channels
    if around:
        strides = (images[2] * images[3] * channels, 1, row, channels)
    settings = zip(images[2:], window, layer.padding, layer.stride, layer.dilation, strict=True)
    height, width = (
        ((size + 2 * zeros - spread * (taps - 1) - 1) // step + 1) // each
        for size, taps, zeros, step, spread in settings
    )
    vectors = min(-(-outs // 16), _MOST_VECTORS)
    blocks, lanes = -(-outs // (16 * vectors)), 16 * vectors
    taps = _taps(layer, strides)
    # The sums of a band fit the cache, and a few images make work for every thread.
    pixels = each * each * width
    band = max(1, min(_BAND // (4 * lanes * pixels), -(-height * images[0] // threads), height))
    bands = -(-height // band)
    parts = min(threads, images[0] * bands)
    rounded = pixels * band + ROWS[vectors - 1]
    reach = (each * band - 1) * layer.stride[0] + layer.dilation[0] * (window[0] - 1) + 1
    scratch_step = 4 * lanes * (blocks + rounded) + 8 * rounded + around * 4 * (reach * row + 16)
    sizes = ServingArguments(
        taps=taps.data_ptr(),
        image_step=4 * strides[0],
        row_step=4 * strides[2] * layer.stride[0],
        pixel_step=4 * strides[3] * layer.stride[1],
        values=taps.numel(),
        blocks=blocks,
        images=images[0],
        height=height,
        width=width,
        out_channels=outs,
        band=band,
        bands=bands,
        scratch_step=scratch_step,
        parts=parts,
        in_row=images[3] * channels,
        sheet_row=around * row,
        left=layer.padding[1] * channels,
        in_height=images[2],
        top=layer.padding[0],
        reach=reach,
    )
    bf16 = layer.dtype == torch.bfloat16
    key = Key("serving_convolution", bf16, layer.activation, pool=layer.pool, vectors=vectors)
    shape = images[0], outs, height, width
    return Plan(shape, layer.dtype, taps, sizes._asdict(), parts * scratch_step, parts, (Step(key, False),))


def _taps(layer: Layer, strides: tuple[int, ...]) -> Tensor:
    """How far the values of a patch lie from its first, in bytes, in the order that they are summed in."""
    _, channels, height, width = layer.kernel
    down = torch.arange(height).view(-1, 1, 1) * (layer.dilation[0] * strides[2])
    right = torch.arange(width).view(-1, 1) * (layer.dilation[1] * strides[3])
    taps = 4 * (down + right + torch.arange(channels) * strides[1])
    return (taps.permute(2, 0, 1) if layer.channel_first else taps).flatten()


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
    """Return ``pool(activation(convolution(x)))``, in channels_last.

    Args:
        x: ``(N, C, H, W)`` float32, of the shape and strides that the plan is for.
        weight: From ``lay_out``.
        bias: ``(O,)`` contiguous float32, or None.
        plan: From ``plan_of``.
    """
    out = torch.empty(plan.shape, dtype=plan.dtype, memory_format=torch.channels_last)
    memory = torch.empty(plan.nbytes, dtype=torch.uint8)
    addresses = {
        "x": x.data_ptr(),
        "weight": weight.data_ptr(),
        "bias": 0 if bias is None else bias.data_ptr(),
        "out": out.data_ptr(),
        "scratch": memory.data_ptr(),
    }
    run(plan.steps, _pack(addresses, plan.sizes), plan.parts, plan.parts)
    return out
