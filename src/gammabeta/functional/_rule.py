"""The autograd rule, one for every backend: what is saved, how it is differentiated once, and twice.

Saved are ``x``, the per-channel statistics and parameters, and the residual where an activation needs it to
recompute its mask. The first derivative is the kernels'. The second, asked for with ``create_graph=True``,
is that of torch's operators, rebuilt from what was saved.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _composition
from ._layout import like


def single(t: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """A per-channel parameter as the kernels read it: float32, contiguous."""
    if t is None or (t.dtype is dtype and t.is_contiguous()):
        return t
    return t.to(dtype).contiguous()


def gradients(
    kernel: Any,
    grad: Tensor,
    saved: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor],
    activation: str | None,
    pool: int | None,
    training: bool,
    need_x: bool,
    need_affine: bool,
    need_residual: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of ``x``, weight, bias and residual from one backend's kernels; None where not needed."""
    x, weight, bias, residual, mean, invstd = saved
    kind = mean.dtype
    call = (
        like(grad, x),
        x,
        mean,
        invstd,
        single(weight, kind),
        single(bias, kind),
        residual,
        activation,
        pool,
    )
    dx = dweight = dbias = dresidual = None
    if not need_x and not need_residual:
        dbias, dweight = kernel.backward_reduce(*call)
    elif training:
        dx, dweight, dbias, dresidual = kernel.backward(*call, need_residual)
    else:
        if need_affine:
            dbias, dweight = kernel.backward_reduce(*call)
        zero = torch.zeros_like(mean)
        dx, dresidual = kernel.backward_apply(*call, zero, zero, need_residual)
    if weight is not None and dweight is not None:
        dweight = dweight.to(weight.dtype)
    if bias is not None and dbias is not None:
        dbias = dbias.to(bias.dtype)
    return dx, dweight, dbias, dresidual


def gradients_of_gradients(
    grad: Tensor,
    saved: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor],
    activation: str | None,
    pool: int | None,
    training: bool,
    eps: float,
    needs: tuple[bool, bool, bool, bool],
) -> list[Tensor | None]:
    """The same gradients with a graph behind them: torch's operators, recomputed and differentiated."""
    x, weight, bias, residual, mean, invstd = saved
    if training:
        out = F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
        out = _composition.finish(out, residual, activation, pool)
    else:
        out = _composition.affine(x, mean, invstd, weight, bias, residual, activation, pool)
    wanted = [t if need else None for t, need in zip((x, weight, bias, residual), needs, strict=True)]
    inputs = [t for t in wanted if t is not None]
    found = iter(torch.autograd.grad(out, inputs, grad, create_graph=True))
    return [None if t is None else next(found) for t in wanted]


def save(
    ctx: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    activation: str | None,
    pool: int | None,
    training: bool,
    eps: float,
) -> None:
    """Keep what ``backward`` reads; not a residual that is only added: its gradient is the upstream one."""
    ctx.only_added = residual is not None and activation is None and pool is None
    ctx.save_for_backward(x, weight, bias, None if ctx.only_added else residual, mean, invstd)
    ctx.activation, ctx.pool, ctx.training, ctx.eps = activation, pool, training, eps


def backward(
    ctx: Any, grad: Tensor | None, needs: tuple[bool, bool, bool, bool], first_order: Any
) -> tuple[Tensor | None, ...]:
    """Apply the rule.

    Args:
        ctx: what ``save`` filled.
        grad: the gradient at the output, or None if nothing arrived.
        needs: which of ``x``, weight, bias and residual want a gradient.
        first_order: ``gradients`` bound to a backend.
    """
    if grad is None:
        return None, None, None, None
    saved = ctx.saved_tensors
    added = grad if ctx.only_added and needs[3] else None
    if ctx.only_added:
        needs = (needs[0], needs[1], needs[2], False)
    found: Any = (None, None, None, None)
    if not any(needs):
        pass
    elif torch.is_grad_enabled():
        found = gradients_of_gradients(grad, saved, ctx.activation, ctx.pool, ctx.training, ctx.eps, needs)
    else:
        found = first_order(
            grad, saved, ctx.activation, ctx.pool, ctx.training, needs[0], needs[1] or needs[2], needs[3]
        )
    dx, dweight, dbias, dresidual = (g if need else None for g, need in zip(found, needs, strict=True))
    return dx, dweight, dbias, added if ctx.only_added else dresidual
