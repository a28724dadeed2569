"""Batch normalization over the batches of several processes: what they exchange, and the autograd rule.

Forward, one all-gather: ``[count | mean | M2]`` of each rank, ``2C + 1`` float64, where ``M2`` is the sum of
squared deviations from that rank's own mean. Every rank merges them in the order of the ranks by Chan's
formula, so all get the same bits, and none subtracts two large numbers. Backward, one all-reduce: the sums of
``dz`` and ``dz * xhat``, ``2C`` values. The gradients of weight and bias stay each rank's own, as for all
other parameters: ``DistributedDataParallel`` averages them.

Chan, Golub and LeVeque 1983, "Algorithms for Computing the Sample Variance", equations 2.1.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..epilogue import NOTHING, Epilogue
from ..kernels import tensors
from ..kernels.backend import Backend, Call, Normalized, Running
from ..kernels.layout import like
from . import step
from .autograd import differentiate, kernel_call

# --- what is exchanged ------------------------------------------------------------------------------------


def merge(gathered: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge ``(ranks, 2C + 1)`` rows of ``[count | mean | M2]``: ``(count (), mean (C,), biased var (C,))``.

    A rank without values has weight 0, whatever its row says of mean and ``M2`` (zeros). If there is no value
    at all, mean and variance are 0. No value is read back, so no device waits.
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


def _gather(backend: Backend, x: Tensor, group: Any) -> Tensor:
    """Every rank's ``[count | mean | M2]``, float64 ``(ranks, 2C + 1)``."""
    channels = x.shape[1]
    mine = torch.zeros(2 * channels + 1, dtype=torch.float64, device=x.device)
    if x.numel():
        count = x.numel() // channels
        mean, var = backend.statistics(x)
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


class _Plan(NamedTuple):
    """What a synchronised pass needs besides its tensors."""

    backend: Backend
    group: Any
    epilogue: Epilogue
    eps: float
    statistics: list[Tensor]  # on the way out: the count, mean and variance of all ranks


class _Synced(torch.autograd.Function):
    """Normalise with the statistics of all ranks' batches; they leave through the plan."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: _Plan,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        kind = tensors.statistics_dtype(x)
        count, mean64, var64 = merge(_gather(plan.backend, x, plan.group))
        mean, invstd = mean64.to(kind), (var64 + plan.eps).rsqrt().to(kind)
        call = Call(x, weight, bias, residual, plan.epilogue, plan.eps)
        out = plan.backend.forward(Normalized(kernel_call(call, kind), mean, invstd))
        plan.statistics.extend((count, mean64, var64))
        ctx.save_for_backward(x, weight, bias, residual, mean, invstd, count)
        ctx.plan = plan
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bias, residual, mean, invstd, count = ctx.saved_tensors
        call = Call(x, weight, bias, residual, ctx.plan.epilogue, ctx.plan.eps)
        derivative = _twice if torch.is_grad_enabled() else _once
        normalized = Normalized(call, mean, invstd)
        return None, *derivative(grad, normalized, count, ctx.plan, ctx.needs_input_grad[1:])


def _once(
    grad: Tensor, normalized: Normalized, count: Tensor, plan: _Plan, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients of ``x``, weight, bias and residual; the ranks exchange sums only if ``x`` needs one."""
    call, mean, invstd, _ = normalized
    backend = plan.backend
    given = Normalized(kernel_call(call, mean.dtype), mean, invstd)
    grad = grad if backend is tensors else like(grad, call.x)
    sums = torch.stack(backend.backward_reduce(grad, given))
    dweight = sums[1].to(call.weight.dtype, copy=True) if needs[1] and call.weight is not None else None
    dbias = sums[0].to(call.bias.dtype, copy=True) if needs[2] and call.bias is not None else None
    dx = dresidual = None
    if needs[0]:
        dist.all_reduce(sums, group=plan.group)
    if needs[0] or needs[3]:
        means = sums / count.to(mean.dtype).clamp(min=1)
        dx, dresidual = backend.backward_apply(grad, given, (means[0], means[1]), needs[3])
    return dx if needs[0] else None, dweight, dbias, dresidual


def _twice(
    grad: Tensor, normalized: Normalized, count: Tensor, plan: _Plan, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The same with a graph behind them: torch's operators and a differentiable sum over the ranks.

    Every rank must differentiate twice, as every rank must call backward.
    """
    call, about, _, _ = normalized
    x = call.x
    shape, axes = (1, -1, *[1] * (x.dim() - 2)), [0, *range(2, x.dim())]
    total: Any = _SumOverRanks.apply
    size = count.to(about.dtype).clamp(min=1)
    centred = x.to(about.dtype) - about.view(shape)
    shift = total(centred.sum(axes), plan.group) / size
    var = total((centred - shift.view(shape)).square().sum(axes), plan.group) / size
    out = tensors.affine(Normalized(call, about + shift, (var + call.eps).rsqrt()))
    return differentiate(out, (x, call.weight, call.bias, call.residual), needs, grad)


# --- one step ---------------------------------------------------------------------------------------------


def train(call: Call, running: Running, group: Any) -> tuple[Tensor, bool | Tensor]:
    """Normalise with the statistics of all ranks of ``group`` and update the running ones, if there are any.

    Returns:
        The output, and whether the batch was counted: a bool, or a boolean tensor where reading it would
        make a device wait. It is counted, or not, on all ranks alike.

    Raises:
        ValueError: one value per channel, or arguments that torch refuses, too; on all ranks alike.
    """
    _refuse(call, running)
    found = step.choose_kernels(call, "auto")
    statistics: list[Tensor] = []
    differentiable: Any = _Synced.apply
    if isinstance(found, str):
        plan = _Plan(tensors, group, NOTHING, call.eps, statistics)
        out = differentiable(plan, call.x, call.weight, call.bias, None)
        out = call.epilogue.apply(out, call.residual)
    else:
        call = found.call
        plan = _Plan(found.backend, group, call.epilogue, call.eps, statistics)
        out = differentiable(plan, call.x, call.weight, call.bias, call.residual)
    count, mean, var = statistics
    on_cpu = call.x.is_cpu
    if on_cpu and count == 1:
        raise ValueError("Expected more than 1 value per channel when training, got 1 over all ranks")
    if running.mean is None or running.var is None or (on_cpu and count == 0):
        return out, True
    if not on_cpu:  # nothing in, nothing changes, and no device waits
        running = running._replace(factor=torch.where(count > 0, running.factor, 0.0))
    return out, tensors.enter(running, mean, var * (count / (count - 1)))


def _refuse(call: Call, running: Running) -> None:
    """Raise what torch raises for such arguments, before this rank makes any other wait for it."""
    two = call.x.new_zeros((2, call.x.shape[1]))  # this rank's own share may be empty, or a single value
    if step.irregular(call._replace(x=two), running._replace(factor=0.0), True):
        F.batch_norm(two, running.mean, running.var, call.weight, call.bias, True, 0.0, call.eps)
