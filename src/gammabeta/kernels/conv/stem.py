"""A network's first convolution with the batch normalization behind it, on a CPU, its output never stored.

For an input without gradient whose patches are small. With patches p of K values over M output pixels, their
mean μ and biased covariance S, and the convolution's output y = w·p + b:

    mean y = w·μ + b,  var y = w'Sw,  z = γ (y - mean y) invstd + β   (Ioffe and Szegedy 2015, algorithm 1)

and with g = Σ dz (p - μ), summed over all pixels,

    dβ = Σ dz,  dγ = invstd w·g,  dw = γ invstd (g - dγ invstd S w),  db = 0.

So nothing of the size of y is read or written: z is computed anew where it is wanted. The forward pass is a
convolution by ``serving``, from weights with the normalisation in them.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...epilogue import NOTHING, Epilogue
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
    why = serving.unsupported(epilogue.activation)
    if why is not None:
        return why
    pool = epilogue.pool
    outs, channels, *kernel = weight
    height, width = images[2] - kernel[0] + 1, images[3] - kernel[1] + 1
    if images[1] != channels or min(images[0], height, width) < 1:
        return "the shapes do not fit each other"
    if channels * kernel[0] * kernel[1] > MOST_VALUES or outs > MOST_CHANNELS:
        return (
            f"patches have more than {MOST_VALUES} values, or the output more than {MOST_CHANNELS} channels"
        )
    if pool not in (None, 2):
        return "no kernel has such a pooling"
    if (pool and height < 2) or (width // 2 * 2 if pool else width) < ROWS[_vectors(outs) - 1]:
        return "the output is narrower than a tile"
    return None


class _Pass(NamedTuple):
    """Kernels that run one after the other, and the bytes of working memory that each part has."""

    steps: tuple[Step, ...]
    sums: int = 0  # that are added up over the parts
    scratch: int = 0


class _Plan(NamedTuple):
    """How stems of one shape are worked on, in parts that are runs of images."""

    sizes: dict[str, float]  # the fields of ``StemArguments``, those that depend on the shape set
    parts: int
    scaled: tuple[int, int]  # the shape of the weights with the normalisation in them
    statistics: _Pass
    weights: _Pass
    forward: serving.Plan
    backward: _Pass


@lru_cache(256)
def _plan_of(
    images: torch.Size, weight: torch.Size, epilogue: Epilogue, dtype: torch.dtype, threads: int
) -> _Plan:
    """Plan for images and a weight of these shapes, and an output of ``dtype``."""
    activation, pool = epilogue.activation, bool(epilogue.pool)
    count, channels, height, width = images
    outs, _, kernel_height, kernel_width = weight
    out_height, out_width = height - kernel_height + 1, width - kernel_width + 1  # the convolution's
    values, vectors, parts = weight[1:].numel(), _vectors(outs), max(1, min(threads, count))
    lanes = 16 * vectors
    sizes = StemArguments(
        images=count,
        channels=channels,
        height=height,
        width=width,
        out_channels=outs,
        kernel_height=kernel_height,
        kernel_width=kernel_width,
        parts=parts,
    )

    padded = -(-values // 3) * 3
    scratch = 8 * padded + 4 * (padded * out_height * -(-out_width // 16) * 16 + images[1:].numel() + 48)
    moments = Step(Key("stem_moments"), once=False), Step(Key("finish_stem_statistics"), once=True)
    statistics = _Pass(moments, 8 * padded * (padded + 1), scratch)

    weights = Step(Key("stem_weights", vectors=vectors), once=True)
    layer = serving.Layer(
        kernel=(outs, channels, kernel_height, kernel_width),
        padding=(0, 0),
        stride=(1, 1),
        dilation=(1, 1),
        activation=activation,
        pool=pool,
        dtype=dtype,
        channel_first=True,
    )
    strides = (channels * height * width, height * width, width, 1)
    forward = serving.plan_of(images, strides, layer, threads)

    padded = -(-values // ROWS[vectors - 1]) * ROWS[vectors - 1]
    scratch = 4 * lanes * (padded + 1 + (2 if pool else 1) * out_width) + 8 * (padded + out_width)
    reduce = Key("stem_reduce", dtype == torch.bfloat16, activation, pool=pool, vectors=vectors)
    finish = Step(Key("finish_stem_gradients", vectors=vectors), once=True)
    backward = _Pass((weights, Step(reduce, once=False), finish), 8 * lanes * (padded + 1), scratch)
    scaled = (values + 1, lanes)
    return _Plan(sizes._asdict(), parts, scaled, statistics, _Pass((weights,)), forward, backward)


def _vectors(outs: int) -> int:
    return -(-outs // 16)


def _plan(stem: Stem, dtype: torch.dtype = torch.float32) -> _Plan:
    return _plan_of(stem.x.shape, stem.weight.shape, stem.epilogue, dtype, torch.get_num_threads())


def _launch(plan: _Plan, which: _Pass, stem: Stem, found: Statistics, **tensors: Tensor) -> None:
    """Run a pass on what goes into the layers, the statistics, and more fields of ``StemArguments``."""
    step = -(-which.scratch // 64) * 64
    memory = torch.empty(plan.parts * (which.sums + step) + 64, dtype=torch.uint8)
    start = memory.data_ptr()
    given = {**stem._asdict(), **found._asdict(), **tensors}
    fields: dict[str, float] = {name: t.data_ptr() for name, t in given.items() if isinstance(t, Tensor)}
    fields["sums"], fields["eps"], fields["scratch_step"] = start, stem.eps, step
    fields["scratch"] = -(-(start + plan.parts * which.sums) // 64) * 64
    run(which.steps, _pack(fields, plan.sizes), plan.parts, plan.parts)


def statistics(stem: Stem) -> Statistics:
    """Return the statistics of a convolution's output, from those of what it reads."""
    plan = _plan(stem)
    (values, _), outs = plan.scaled, len(stem.weight)
    mean, invstd, var = torch.empty(3, outs).unbind()
    patchwise = torch.empty(outs + 1, values - 1, dtype=torch.float64)
    found = Statistics(mean, invstd, var, patchwise[0], patchwise[1:])
    _launch(plan, plan.statistics, stem, found)
    return found


def forward(stem: Stem, found: Statistics, dtype: torch.dtype) -> Tensor:
    """Return ``pool(activation(bn(convolution(x))))``, ``(N, O, H', W')`` in channels_last.

    Args:
        stem: The layers and their input.
        found: From ``statistics``, or the running mean, without the convolution's bias, and its invstd.
        dtype: Of the output: float32 or bfloat16.
    """
    plan = _plan(stem, dtype)
    scaled = torch.empty(plan.scaled)
    _launch(plan, plan.weights, stem, found, scaled=scaled)
    return serving.convolve(stem.x, scaled, scaled[-1], plan.forward)


def backward(grad: Tensor, stem: Stem, found: Statistics) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``(weight, gamma, beta)``, float32, from that of ``forward``'s output.

    The batch's statistics, which ``found`` has, are differentiated too.
    """
    plan = _plan(stem, grad.dtype)
    grad = grad.contiguous(memory_format=torch.channels_last)
    outs, scaled = len(stem.weight), torch.empty(plan.scaled)
    dweight, dgamma, dbeta = torch.empty_like(stem.weight), torch.empty(outs), torch.empty(outs)
    results = {"dweight": dweight, "dgamma": dgamma, "dbeta": dbeta}
    _launch(plan, plan.backward, stem, found, grad=grad, scaled=scaled, **results)
    return dweight, dgamma, dbeta
