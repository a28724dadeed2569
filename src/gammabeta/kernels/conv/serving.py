"""A convolution, an activation and a 2x2 mean as one, from weights laid out beforehand; AVX-512 on a CPU.

A call of oneDNN through torch costs 20 µs, and writes what is pooled next. This one costs a quarter of that,
and writes the result alone.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...epilogue import ACTIVATIONS
from ..cpu.launch import Step, run
from ..cpu.registry import Key
from .registers import ROWS
from .serving_arguments import pack

Pair = tuple[int, int]

_BAND = 1 << 14  # bytes of sums in a band: they stay in the first cache. Measured.
_MOST_VECTORS = 4  # in a block of channels


def unsupported(activation: str | None) -> str | None:
    """Why there is no kernel on this machine or for this activation, None if there is."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "the kernel's tiles need the 32 vector registers of AVX-512"
    return (
        None
        if activation is None or activation in ACTIVATIONS
        else f"no kernel has the activation {activation!r}"
    )


def lay_out(weight: Tensor) -> Tensor:
    """Copy a float32 weight ``(O, C, KH, KW)`` into blocks of V vectors of channels: (B, KH·KW·C, 16 V)."""
    outs = len(weight)
    vectors = min(-(-outs // 16), _MOST_VECTORS)
    blocks = -(-outs // (16 * vectors))
    rows = weight.new_zeros(weight[0].numel(), 16 * vectors * blocks)
    rows[:, :outs] = weight.permute(2, 3, 1, 0).reshape(-1, outs)
    return rows.unflatten(1, (blocks, -1)).transpose(0, 1).contiguous()


class Plan(NamedTuple):
    """How inputs of one shape and layout are convolved."""

    shape: tuple[int, int, int, int]  # of the output
    taps: Tensor  # (KH·KW·C,) int64: how far the values of a patch lie from its first, in bytes
    sizes: tuple[int, ...]  # the slots behind the addresses
    nbytes: int  # of working memory
    parts: int
    steps: tuple[Step, ...]


@lru_cache(1024)
def plan_of(
    images: torch.Size,
    strides: tuple[int, ...],
    kernel: tuple[int, int, int, int],
    padding: Pair,
    stride: Pair,
    dilation: Pair,
    activation: str | None,
    pool: bool,
    threads: int,
) -> Plan:
    """Plan for inputs ``(N, C, H, W)`` that with the padding are at least as large as the kernel.

    Args:
        images: The shape of the input.
        strides: Its strides, in elements; any without padding, else those of channels_last.
        kernel: ``(O, C, KH, KW)``.
        padding: Zeros above and below an image, and to its left and right.
        stride: Of the convolution.
        dilation: Of the convolution.
        activation: One of ``ACTIVATIONS``.
        pool: Whether the mean over 2x2 windows follows; a last odd row or column is not computed.
        threads: How many there are.
    """
    outs, channels, *window = kernel
    each = 2 if pool else 1
    sheet = padding != (0, 0)
    row = (images[3] + 2 * padding[1]) * channels
    if sheet:
        strides = (images[2] * images[3] * channels, 1, row, channels)
    height, width = (
        ((size + 2 * zeros - spread * (taps - 1) - 1) // step + 1) // each
        for size, taps, zeros, step, spread in zip(images[2:], window, padding, stride, dilation, strict=True)
    )
    vectors = min(-(-outs // 16), _MOST_VECTORS)
    blocks, lanes = -(-outs // (16 * vectors)), 16 * vectors
    down = torch.arange(window[0]).view(-1, 1, 1) * (dilation[0] * strides[2])
    right = torch.arange(window[1]).view(-1, 1) * (dilation[1] * strides[3])
    taps = (4 * (down + right + torch.arange(channels) * strides[1])).flatten()
    # The sums of a band fit the cache, and a few images make work for every thread.
    pixels = each * each * width
    band = max(1, min(_BAND // (4 * lanes * pixels), -(-height * images[0] // threads), height))
    bands = -(-height // band)
    parts = min(threads, images[0] * bands)
    rounded = pixels * band + ROWS[vectors - 1]
    reach = (each * band - 1) * stride[0] + dilation[0] * (window[0] - 1) + 1
    step = 4 * lanes * (blocks + rounded) + 8 * rounded + sheet * 4 * (reach * row + 16)
    sizes = (
        *(4 * strides[0], 4 * strides[2] * stride[0], 4 * strides[3] * stride[1]),
        *(taps.numel(), blocks, images[0], height, width, outs, band, bands, step, parts),
        *(images[3] * channels, sheet * row, padding[1] * channels, images[2], padding[0], reach),
    )
    steps = (Step(Key("serving_convolution", False, activation, False, pool, vectors), once=False),)
    return Plan((images[0], outs, height, width), taps, sizes, parts * step, parts, steps)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
    """Return ``pool(activation(convolution(x)))``, in channels_last.

    Args:
        x: ``(N, C, H, W)`` float32, of the shape and strides that the plan is for.
        weight: From ``lay_out``.
        bias: ``(O,)`` contiguous float32, or None.
        plan: From ``plan_of``.
    """
    out = torch.empty(plan.shape, memory_format=torch.channels_last)
    memory = torch.empty(plan.nbytes, dtype=torch.uint8)
    arguments = pack(
        x.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        plan.taps.data_ptr(),
        memory.data_ptr(),
        *plan.sizes,
    )
    run(plan.steps, arguments, plan.parts, plan.parts)
    return out
