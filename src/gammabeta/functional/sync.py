"""Batch normalization over the batches of several processes: what they exchange, and the autograd rule.

Forward, one all-gather: ``[count | mean | M2]`` of each rank, ``2C + 1`` float64, where ``M2`` is the sum of
squared deviations from that rank's own mean. Every rank merges them in the order of the ranks by Chan's
formula, so all get the same bits, and none subtracts two large numbers. Backward, one all-reduce: the sums of
``dz`` and ``dz * xhat``, ``2C`` values. The gradients of weight and bias stay each rank's own, as for all
other parameters: ``DistributedDataParallel`` averages them.

Chan, Golub and LeVeque 1983, "Algorithms for Computing the Sample Variance", equations 2.1.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..kernels.layout import like
from . import plain, running, torch_path
from .autograd import single
from .checks import irregular
from .route import select

# --- what is exchanged ------------------------------------------------------------------------------------


def merge(gathered: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge ``(ranks, 2C + 1)`` rows of ``[count | mean | M2]``: ``(count (), mean (C,), biased var (C,))``.

    A rank without values weighs nothing, whatever its row says of mean and ``M2`` (zeros). Without any value
    at all mean and variance are 0. No value is read back, so no device waits.
    """
    channels = gathered.shape[1] // 2
    counts, means, m2 = gathered.split((1, channels, channels), 1)
    total = counts.sum()
    divisor = total.clamp(min=1)
    # About the first mean with values behind it: means of 1e4 that differ by 1e-2 keep their digits.
    first = means[counts[:, 0].argmax()]
    mean = first + ((means - first) * counts).sum(0) / divisor
    var = (m2 + (means - mean).square() * counts).sum(0) / divisor
    return total, mean, var


def _gather(kernel: Any, x: Tensor, group: Any) -> Tensor:
    """Every rank's ``[count | mean | M2]``, float64 ``(ranks, 2C + 1)``."""
    channels = x.shape[1]
    mine = torch.zeros(2 * channels + 1, dtype=torch.float64, device=x.device)
    if x.numel():
        count = x.numel() // channels
        mean, var = kernel.statistics(x)
        mine[0] = count
        mine[1 : channels + 1] = mean
        torch.mul(var.double(), count, out=mine[channels + 1 :])
    everyone = mine.new_empty(dist.get_world_size(group) * mine.numel())
    # PyTorch 2.13 has given it a new name and deprecated the old one.
    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(everyone, mine, group=group)
    return everyone.view(-1, mine.numel())


class _SumOverRanks(torch.autograd.Function):
    """The sum of all ranks' values, which every rank's loss depends on: its gradient is summed likewise."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = t.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        differentiable: Any = _SumOverRanks.apply
        return differentiable(grad, ctx.group), None


# --- the rule ---------------------------------------------------------------------------------------------


class _Synced(torch.autograd.Function):
    """Normalise with the statistics of all ranks' batches; they leave through ``statistics``."""

    @staticmethod
    def forward(
        ctx: Any,
        kernel: Any,
        group: Any,
        statistics: list[Tensor],
        eps: float,
        activation: str | None,
        pool: int | None,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        kind = torch.float64 if x.dtype is torch.float64 else torch.float32
        count, mean64, var64 = merge(_gather(kernel, x, group))
        mean, invstd = mean64.to(kind), (var64 + eps).rsqrt().to(kind)
        out: Tensor = kernel.forward(
            x, mean, invstd, single(weight, kind), single(bias, kind), residual, activation, pool
        )
        statistics += (count, mean64, var64)
        ctx.save_for_backward(x, weight, bias, residual, mean, invstd, count)
        ctx.settings = (kernel, group, eps, activation, pool)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        needs = ctx.needs_input_grad[6:]
        found = (_twice if torch.is_grad_enabled() else _once)(ctx, grad, needs)
        return (None, None, None, None, None, None, *found)


def _once(ctx: Any, grad: Tensor, needs: tuple[bool, bool, bool, bool]) -> tuple[Tensor | None, ...]:
    """The gradients of ``x``, weight, bias and residual; the ranks meet only where ``x`` wants one."""
    x, weight, bias, residual, mean, invstd, count = ctx.saved_tensors
    kernel, group, _, activation, pool = ctx.settings
    kind = mean.dtype
    w, b = single(weight, kind), single(bias, kind)
    grad = grad if kernel is plain else like(grad, x)
    call = (grad, x, mean, invstd, w, b, residual, activation, pool)
    sums = torch.stack(kernel.backward_reduce(*call))
    dweight = sums[1].to(weight.dtype, copy=True) if needs[1] else None
    dbias = sums[0].to(bias.dtype, copy=True) if needs[2] else None
    dx = dresidual = None
    if needs[0]:
        dist.all_reduce(sums, group=group)
    if needs[0] or needs[3]:
        means = sums / count.to(kind).clamp(min=1)
        dx, dresidual = kernel.backward_apply(*call, means[0], means[1], needs[3])
    return dx if needs[0] else None, dweight, dbias, dresidual


def _twice(ctx: Any, grad: Tensor, needs: tuple[bool, bool, bool, bool]) -> tuple[Tensor | None, ...]:
    """The same with a graph behind them: torch's operators and a differentiable sum over the ranks.

    Every rank must differentiate twice, as every rank must call backward.
    """
    x, weight, bias, residual, about, _, count = ctx.saved_tensors
    _, group, eps, activation, pool = ctx.settings
    shape, axes = (1, -1, *[1] * (x.dim() - 2)), [0, *range(2, x.dim())]
    total: Any = _SumOverRanks.apply
    size = count.to(about.dtype).clamp(min=1)
    centred = x.to(about.dtype) - about.view(shape)
    shift = total(centred.sum(axes), group) / size
    var = total((centred - shift.view(shape)).square().sum(axes), group) / size
    invstd = (var + eps).rsqrt()
    out = torch_path.affine(x, about + shift, invstd, weight, bias, residual, activation, pool)
    wanted = [t if need else None for t, need in zip((x, weight, bias, residual), needs, strict=True)]
    inputs = [t for t in wanted if t is not None]
    found = iter(torch.autograd.grad(out, inputs, grad, create_graph=True))
    return tuple(None if t is None else next(found) for t in wanted)


# --- one step ---------------------------------------------------------------------------------------------


def train(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    factor: float | Tensor,
    eps: float,
    activation: str | None,
    residual: Any,
    pool: int | None,
    skip_nonfinite: bool,
    group: Any,
) -> tuple[Tensor, bool | Tensor]:
    """Normalise with the statistics of all ranks of ``group`` and update the running ones, if there are any.

    Returns:
        The output, and whether the batch was counted: a bool, or a boolean tensor where reading it would
        make a device wait. It is counted, or not, on all ranks alike.

    Raises:
        ValueError: one value per channel, or arguments that torch refuses, too; on all ranks alike.
    """
    _refuse(x, running_mean, running_var, weight, bias, eps)
    kernel, x, residual = select(x, residual, activation, pool, "auto")
    tail = (residual, activation, pool)
    fused = not isinstance(kernel, str)
    statistics: list[Tensor] = []
    differentiable: Any = _Synced.apply
    if fused:
        out = differentiable(kernel, group, statistics, eps, activation, pool, x, weight, bias, residual)
    else:
        out = differentiable(plain, group, statistics, eps, None, None, x, weight, bias, None)
        out = torch_path.finish(out, *tail)
    count, mean, var = statistics
    if x.is_cpu and count == 1:
        raise ValueError("Expected more than 1 value per channel when training, got 1 over all ranks")
    if running_mean is None or running_var is None or (x.is_cpu and count == 0):
        return out, True
    if not x.is_cpu:
        factor = torch.where(count > 0, factor, 0.0)  # nothing in, nothing changes, and no device waits
    unbiased = var * (count / (count - 1))
    return out, running.update(running_mean, running_var, mean, unbiased, factor, skip_nonfinite)


def _refuse(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> None:
    """Raise what torch raises for such arguments, before this rank makes any other wait for it."""
    two = x.new_zeros((2, x.shape[1]))  # this rank's own share may be empty, or a single value
    if irregular(two, running_mean, running_var, weight, bias, True, 0.0, eps):
        F.batch_norm(two, running_mean, running_var, weight, bias, True, 0.0, eps)
