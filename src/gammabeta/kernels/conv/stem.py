"""A network's first convolution with the batch normalization behind it, on a CPU, its output never stored.

For an input without gradient whose patches are small. With patches p of K values over M output pixels, their
mean μ and biased covariance S, and the convolution's output y = w·p + b:

    mean y = w·μ + b,  var y = w'Sw,  z = γ (y - mean y) invstd + β   (Ioffe and Szegedy 2015, algorithm 1)

and with g = Σ dz (p - μ), summed over all pixels,

    dβ = Σ dz,  dγ = invstd w·g,  dw = γ invstd (g - dγ invstd S w),  db = 0.

So nothing of the size of y is read or written: z is computed anew where it is wanted.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...epilogue import ACTIVATIONS
from ..cpu.launch import Step, run
from ..cpu.registry import Key
from .registers import ROWS
from .stem_arguments import pack

MOST_VALUES = 32  # of a patch: the covariance takes half its square of products for each pixel
MOST_CHANNELS = 64  # four vectors of them leave registers for five pixels
_DTYPES = (torch.float32, torch.bfloat16)


class Statistics(NamedTuple):
    """What one batch gives: of the output's channels ``(O,)`` float32, of the patches float64."""

    mean: Tensor  # without the convolution's bias
    var: Tensor  # biased
    invstd: Tensor
    patch: Tensor  # (K,): the mean patch
    covariance: Tensor  # (O, K): of each output channel with the patch


def unsupported(
    images: tuple[int, ...], weight: tuple[int, ...], activation: str | None, pool: int | None
) -> str | None:
    """Why there is no kernel for such layers, None if there is.

    Args:
        images: ``(N, C, H, W)``, the zeros around an image included.
        weight: ``(O, C, KH, KW)``; stride and dilation are 1.
        activation: What follows batch normalization.
        pool: 2 for a 2x2 mean after it.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "the kernel's tiles need the 32 vector registers of AVX-512"
    outs, channels, *kernel = weight
    height, width = images[2] - kernel[0] + 1, images[3] - kernel[1] + 1
    if images[1] != channels or min(images[0], height, width) < 1:
        return "the shapes do not fit each other"
    if channels * kernel[0] * kernel[1] > MOST_VALUES or outs > MOST_CHANNELS:
        return (
            f"patches have more than {MOST_VALUES} values, or the output more than {MOST_CHANNELS} channels"
        )
    if (activation is not None and activation not in ACTIVATIONS) or pool not in (None, 2):
        return "no kernel has such an activation or pooling"
    if (pool and height < 2) or width // (pool or 1) * (pool or 1) < ROWS[_vectors(outs) - 1]:
        return "the output is narrower than a tile"
    return None


def statistics(x: Tensor, weight: Tensor, eps: float) -> Statistics:
    """Return the statistics of a convolution's output, from those of what it reads.

    Args:
        x: Images ``(N, C, H, W)``, contiguous float32, the zeros around them included.
        weight: ``(O, C, KH, KW)``, contiguous float32.
        eps: Added to the variance.
    """
    outs, values = len(weight), weight[0].numel()
    channelwise, patchwise = torch.empty(3, outs), torch.empty(outs + 1, values, dtype=torch.float64)
    mean, var, invstd = channelwise.unbind()
    found = Statistics(mean, var, invstd, patchwise[0], patchwise[1:])
    height, width = x.shape[2] - weight.shape[2] + 1, x.shape[3] - weight.shape[3] + 1
    padded = -(-values // 3) * 3
    sums = 8 * padded * (padded + 1)
    step = 8 * padded + 4 * (padded * height * -(-width // 16) * 16 + x[0].numel() + 48)
    _launch(
        (_step("stem_moments", once=False), _step("finish_stem_statistics", once=True)),
        x,
        weight,
        sums,
        step,
        mean=mean,
        var=var,
        invstd=invstd,
        patch=found.patch,
        covariance=found.covariance,
        eps=eps,
    )
    return found


def forward(
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    invstd: Tensor,
    patch: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    activation: str | None,
    pool: int | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return ``pool(activation(bn(convolution(x))))``, ``(N, O, H', W')`` of ``dtype`` in channels_last.

    Args:
        x: As for ``statistics``, as are the weight and, of a batch, the statistics.
        weight: See there.
        mean: See there.
        invstd: See there.
        patch: The mean patch; None where ``mean`` is a running one.
        gamma: ``(O,)`` contiguous float32, or None for ones.
        beta: The same, or None for zeros.
        activation: What follows batch normalization.
        pool: 2 for a 2x2 mean after it, or None.
        dtype: float32 or bfloat16.
    """
    outs, height, width, each = _sizes(x, weight, pool)
    shape = (len(x), outs, height // each, width // each)
    out = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
    lanes = 16 * _vectors(outs)
    values = weight[0].numel()
    step = 4 * lanes * (values + 1 + each * width) + 8 * (values + 16 + width)
    _launch(
        (_step("stem_forward", once=False, outs=outs, dtype=dtype, activation=activation, pool=pool),),
        x,
        weight,
        0,
        step,
        out=out,
        mean=mean,
        invstd=invstd,
        patch=patch,
        gamma=gamma,
        beta=beta,
    )
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    found: Statistics,
    gamma: Tensor | None,
    beta: Tensor | None,
    activation: str | None,
    pool: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``(weight, gamma, beta)``, float32, from that of ``forward``'s output.

    The batch's statistics are differentiated too.
    """
    grad = grad.contiguous(memory_format=torch.channels_last)
    outs, _, width, each = _sizes(x, weight, pool)
    dweight, dgamma, dbeta = torch.empty_like(weight), torch.empty(outs), torch.empty(outs)
    vectors, values = _vectors(outs), weight[0].numel()
    lanes, rows = 16 * vectors, ROWS[vectors - 1]
    padded = -(-values // rows) * rows
    sums = 8 * lanes * (padded + 1)
    step = 4 * lanes * (values + padded + 2 + each * width) + 8 * (values + 16 + width)
    reduce = _step("stem_reduce", once=False, outs=outs, dtype=grad.dtype, activation=activation, pool=pool)
    _launch(
        (reduce, _step("finish_stem_gradients", once=True, outs=outs)),
        x,
        weight,
        sums,
        step,
        grad=grad,
        mean=found.mean,
        invstd=found.invstd,
        patch=found.patch,
        covariance=found.covariance,
        gamma=gamma,
        beta=beta,
        dweight=dweight,
        dgamma=dgamma,
        dbeta=dbeta,
    )
    return dweight, dgamma, dbeta


def _vectors(outs: int) -> int:
    return -(-outs // 16)


def _sizes(x: Tensor, weight: Tensor, pool: int | None) -> tuple[int, int, int, int]:
    """Output channels; rows and columns the convolution gives; how many of them make one of the output."""
    each = pool or 1
    return len(weight), x.shape[2] - weight.shape[2] + 1, x.shape[3] - weight.shape[3] + 1, each


def _step(
    name: str,
    *,
    once: bool,
    outs: int = 0,
    dtype: torch.dtype = torch.float32,
    activation: str | None = None,
    pool: int | None = None,
) -> Step:
    key = Key(name, dtype == torch.bfloat16, activation, False, bool(pool), _vectors(outs))
    return Step(key, once)


def _launch(
    steps: tuple[Step, ...],
    x: Tensor,
    weight: Tensor,
    sums: int,
    step: int,
    *,
    out: Tensor | None = None,
    grad: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    invstd: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    dweight: Tensor | None = None,
    dgamma: Tensor | None = None,
    dbeta: Tensor | None = None,
    patch: Tensor | None = None,
    covariance: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Run steps on parts that are runs of images; a part has ``sums`` and ``step`` bytes of memory."""
    count, channels, height, width = x.shape
    parts = max(1, min(torch.get_num_threads(), count))
    step = -(-step // 64) * 64
    memory = torch.empty(parts * (sums + step) + 64, dtype=torch.uint8)
    start = memory.data_ptr()
    scratch = -(-(start + parts * sums) // 64) * 64
    tensors = (
        x,
        weight,
        dweight,
        out,
        grad,
        mean,
        var,
        invstd,
        gamma,
        beta,
        dgamma,
        dbeta,
        patch,
        covariance,
    )
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    sizes = (count, channels, height, width, len(weight), *weight.shape[2:], parts)
    run(steps, pack(*addresses, start, scratch, step, *sizes, eps), parts, parts)
