"""A network's first convolution with the batch normalization behind it, on a CPU, its output never stored.

For an input without gradient whose patches are small. With patches p of K values over M output pixels, their
mean μ and biased covariance S, and the convolution's output y = w·p + b:

    mean y = w·μ + b,  var y = w'Sw,  z = γ (y - mean y) invstd + β   (Ioffe and Szegedy 2015, algorithm 1)

and with g = Σ dz (p - μ), summed over all pixels,

    dβ = Σ dz,  dγ = invstd w·g,  dw = γ invstd (g - dγ invstd S w),  db = 0.

So nothing of the size of y is read or written: z is computed anew where it is wanted. The forward pass is a
convolution by ``serving``, from weights with the normalisation in them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...epilogue import ACTIVATIONS, NOTHING, Epilogue
from ..cpu.arguments import packer
from ..cpu.launch import Step, run
from ..cpu.registry import Key
from . import serving
from .arguments import ROWS, StemArguments

MOST_VALUES = 32  # of a patch: the covariance takes half its square of products for each pixel
MOST_CHANNELS = 64  # four vectors of them leave registers for five pixels
_pack = packer(StemArguments)


class Stem(NamedTuple):
    """What goes into the two layers, and what follows them."""

    x: Tensor  # (N, C, H, W), contiguous float32, the zeros around the images included
    weight: Tensor  # (O, C, KH, KW), contiguous float32; stride and dilation are 1
    gamma: Tensor | None  # (O,), contiguous float32; None: ones
    beta: Tensor | None  # the same; None: zeros
    epilogue: Epilogue = NOTHING  # an activation and the 2x2 mean
    eps: float = 1e-5  # added to the variance


class Statistics(NamedTuple):
    """Of the output's channels ``(O,)`` float32; what a batch gives of the patches too, float64."""

    mean: Tensor  # without the convolution's bias
    invstd: Tensor
    var: Tensor | None = None  # biased
    patch_mean: Tensor | None = None  # (K,)
    covariance: Tensor | None = None  # (O, K): of each output channel with the patch


def unsupported(images: tuple[int, ...], weight: tuple[int, ...], epilogue: Epilogue) -> str | None:
    """Why there is no kernel for such layers, None if there is.

    Args:
        images: ``(N, C, H, W)``, the zeros around an image included.
        weight: ``(O, C, KH, KW)``; stride and dilation are 1.
        epilogue: What follows batch normalization.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "the kernel's tiles need the 32 vector registers of AVX-512"
    activation, pool = epilogue
    outs, channels, *kernel = weight
    height, width = images[2] - kernel[0] + 1, images[3] - kernel[1] + 1
    if images[1] != channels or min(images[0], height, width) < 1:
        return "the shapes do not fit each other"
    if channels * kernel[0] * kernel[1] > MOST_VALUES or outs > MOST_CHANNELS:
        return (
            f"patches have more than {MOST_VALUES} values, or the output more than {MOST_CHANNELS} channels"
        )
    if not (activation is None or activation in ACTIVATIONS) or pool not in (None, 2):
        return "no kernel has such an activation or pooling"
    if (pool and height < 2) or (width // 2 * 2 if pool else width) < ROWS[_vectors(outs) - 1]:
        return "the output is narrower than a tile"
    return None


def statistics(stem: Stem) -> Statistics:
    """Return the statistics of a convolution's output, from those of what it reads."""
    outs, values = len(stem.weight), stem.weight[0].numel()
    mean, invstd, var = torch.empty(3, outs).unbind()
    patchwise = torch.empty(outs + 1, values, dtype=torch.float64)
    found = Statistics(mean, invstd, var, patchwise[0], patchwise[1:])
    height, width = _convolved(stem)
    padded = -(-values // 3) * 3
    sums = 8 * padded * (padded + 1)
    step = 8 * padded + 4 * (padded * height * -(-width // 16) * 16 + stem.x[0].numel() + 48)
    steps = (Step(Key("stem_moments"), once=False), Step(Key("finish_stem_statistics"), once=True))
    _launch(stem, found, steps, sums, step)
    return found


def forward(stem: Stem, found: Statistics, dtype: torch.dtype) -> Tensor:
    """Return ``pool(activation(bn(convolution(x))))``, ``(N, O, H', W')`` in channels_last.

    Args:
        stem: The layers and their input.
        found: From ``statistics``, or the running mean, without the convolution's bias, and its invstd.
        dtype: Of the output: float32 or bfloat16.
    """
    x, weight = stem.x, stem.weight
    scaled = _scaled(stem)
    _launch(stem, found, (_weights_step(stem),), scaled=scaled)
    activation, pool = stem.epilogue
    outs, channels, height, width = weight.shape
    layer = serving.Layer(
        kernel=(outs, channels, height, width),
        padding=(0, 0),
        stride=(1, 1),
        dilation=(1, 1),
        activation=activation,
        pool=bool(pool),
        dtype=dtype,
        channel_first=True,
    )
    plan = serving.plan_of(x.shape, x.stride(), layer, torch.get_num_threads())
    return serving.convolve(x, scaled, scaled[-1], plan)


def backward(grad: Tensor, stem: Stem, found: Statistics) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``(weight, gamma, beta)``, float32, from that of ``forward``'s output.

    The batch's statistics, which ``found`` has, are differentiated too.
    """
    grad = grad.contiguous(memory_format=torch.channels_last)
    outs, values, width = len(stem.weight), stem.weight[0].numel(), _convolved(stem)[1]
    dweight, dgamma, dbeta = torch.empty_like(stem.weight), torch.empty(outs), torch.empty(outs)
    activation, pool = stem.epilogue
    vectors = _vectors(outs)
    lanes, rows = 16 * vectors, ROWS[vectors - 1]
    padded = -(-values // rows) * rows
    sums = 8 * lanes * (padded + 1)
    step = 4 * lanes * (padded + 1 + (2 if pool else 1) * width) + 8 * (padded + width)
    bf16 = grad.dtype == torch.bfloat16
    steps = (
        _weights_step(stem),
        Step(Key("stem_reduce", bf16, activation, pool=bool(pool), vectors=vectors), once=False),
        Step(Key("finish_stem_gradients", vectors=vectors), once=True),
    )
    results = {"dweight": dweight, "dgamma": dgamma, "dbeta": dbeta}
    _launch(stem, found, steps, sums, step, grad=grad, scaled=_scaled(stem), **results)
    return dweight, dgamma, dbeta


def _vectors(outs: int) -> int:
    return -(-outs // 16)


def _convolved(stem: Stem) -> tuple[int, int]:
    """Rows and columns that the convolution gives."""
    x, weight = stem.x, stem.weight
    return x.shape[2] - weight.shape[2] + 1, x.shape[3] - weight.shape[3] + 1


def _scaled(stem: Stem) -> Tensor:
    """Room for the weights with the normalisation in them, and the constants behind them."""
    return torch.empty(stem.weight[0].numel() + 1, 16 * _vectors(len(stem.weight)))


def _weights_step(stem: Stem) -> Step:
    return Step(Key("stem_weights", vectors=_vectors(len(stem.weight))), once=True)


def _launch(
    stem: Stem, found: Statistics, steps: tuple[Step, ...], sums: int = 0, step: int = 0, **tensors: Tensor
) -> None:
    """Run steps on parts that are runs of images; a part has ``sums`` and ``step`` bytes of memory."""
    x, weight = stem.x, stem.weight
    count, channels, height, width = x.shape
    parts = max(1, min(torch.get_num_threads(), count))
    step = -(-step // 64) * 64
    memory = torch.empty(parts * (sums + step) + 64, dtype=torch.uint8)
    start = memory.data_ptr()
    given = {"x": x, "weight": weight, "gamma": stem.gamma, "beta": stem.beta, **found._asdict(), **tensors}
    addresses = {name: tensor.data_ptr() for name, tensor in given.items() if tensor is not None}
    fields = {
        **addresses,
        "sums": start,
        "scratch": -(-(start + parts * sums) // 64) * 64,
        "scratch_step": step,
        "images": count,
        "channels": channels,
        "height": height,
        "width": width,
        "out_channels": len(weight),
        "kernel_height": weight.shape[2],
        "kernel_width": weight.shape[3],
        "parts": parts,
        "eps": stem.eps,
    }
    run(steps, _pack(fields), parts, parts)
