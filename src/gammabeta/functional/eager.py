"""The cheapest road for eager calls: one ``autograd.Function`` that calls the kernels directly.

No operator is dispatched in between; a call of ``torch.library`` costs about as much as a small batch norm.
"""

from typing import Any

import torch
from torch import Tensor

from ..kernels.layout import Pool
from . import autograd
from .autograd import single


class _Train(torch.autograd.Function):
    """Normalise with the batch's statistics, which leave through ``statistics``: they carry no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        kernel: Any,
        statistics: list[Tensor],
        eps: float,
        activation: str | None,
        pool: Pool,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        out: Tensor
        codes = autograd.codes_of(kernel, x, pool)
        out, mean, var, invstd = kernel.forward_train(
            x, single(weight), single(bias), residual, eps, activation, pool, **codes
        )
        statistics += (mean, var)
        ctx.kernel, ctx.output = kernel, None
        autograd.save(ctx, x, weight, bias, residual, mean, invstd, activation, pool, True, eps, **codes)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        found = autograd.backward(ctx, grad, ctx.needs_input_grad[5:], ctx.kernel, autograd.first_order)
        return (None, None, None, None, None, *found)


class _Apply(torch.autograd.Function):
    """Normalise with statistics that are given and are constants."""

    @staticmethod
    def forward(
        ctx: Any,
        kernel: Any,
        mean: Tensor,
        invstd: Tensor,
        activation: str | None,
        pool: Pool,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        codes = autograd.codes_of(kernel, x, pool)
        out: Tensor = kernel.forward(
            x, mean, invstd, single(weight), single(bias), residual, activation, pool, **codes
        )
        ctx.kernel, ctx.output = kernel, None
        autograd.save(ctx, x, weight, bias, residual, mean, invstd, activation, pool, False, 0.0, **codes)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        found = autograd.backward(ctx, grad, ctx.needs_input_grad[5:], ctx.kernel, autograd.first_order)
        return (None, None, None, None, None, *found)


def _needs_graph(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def train(
    kernel: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
    pool: Pool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(out, mean, biased var)``; only ``out`` is differentiable."""
    if not _needs_graph(x, weight, bias, residual):
        out, mean, var, _ = kernel.forward_train(
            x, single(weight), single(bias), residual, eps, activation, pool
        )
        return out, mean, var
    statistics: list[Tensor] = []
    differentiable: Any = _Train.apply
    out = differentiable(kernel, statistics, eps, activation, pool, x, weight, bias, residual)
    mean, var = statistics
    return out, mean, var


def apply(
    kernel: Any,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    pool: Pool,
) -> Tensor:
    """Normalise with the statistics given: float32, constants."""
    out: Tensor
    if not _needs_graph(x, weight, bias, residual):
        out = kernel.forward(x, mean, invstd, single(weight), single(bias), residual, activation, pool)
    else:
        differentiable: Any = _Apply.apply
        out = differentiable(kernel, mean, invstd, activation, pool, x, weight, bias, residual)
    return out
