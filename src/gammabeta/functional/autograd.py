"""The autograd rule, one for every backend: what is saved, how it is differentiated once, and twice.

Saved are ``x``, the per-channel statistics and parameters, the residual where an activation needs it to
recompute its mask, and for max pooling a byte an output: which of its window it is. The first derivative is
the kernels'. The second, asked for with ``create_graph=True``, is that of torch's operators, rebuilt from
what was saved.

``train`` and ``apply`` call the kernels from one ``autograd.Function``. An operator of ``torch.library`` in
between would cost about as much as a small batch norm; ``library`` has those, for graphs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..epilogue import NOTHING, Epilogue, MaxPool
from ..kernels.backend import Backend, Call, Gradients, Normalized
from ..kernels.layout import like
from ..kernels.tensors import affine


class Needs(NamedTuple):
    """Which gradients are wanted; ``affine``: of the weight or the bias."""

    x: bool
    affine: bool
    residual: bool


# What computes the first derivatives: (grad, normalized, training, needs) -> gradients.
FirstOrder = Callable[[Tensor, Normalized, bool, Needs], tuple[Tensor | None, ...]]


def kernel_call(call: Call, dtype: torch.dtype = torch.float32) -> Call:
    """The call with its weight and bias as the kernels read them: float32 (or ``dtype``), contiguous."""
    x, weight, bias, residual, epilogue, eps = call
    changed = False
    if weight is not None and (weight.dtype is not dtype or not weight.is_contiguous()):
        weight, changed = weight.to(dtype).contiguous(), True
    if bias is not None and (bias.dtype is not dtype or not bias.is_contiguous()):
        bias, changed = bias.to(dtype).contiguous(), True
    return Call(x, weight, bias, residual, epilogue, eps) if changed else call


# --- what is kept -----------------------------------------------------------------------------------------


def save(ctx: Any, normalized: Normalized, training: bool) -> None:
    """Keep what ``backward`` reads; not a residual that is only added: its gradient is the upstream one."""
    (x, weight, bias, residual, epilogue, eps), mean, invstd, codes = normalized
    ctx.only_added = residual is not None and epilogue == NOTHING
    ctx.save_for_backward(x, weight, bias, None if ctx.only_added else residual, mean, invstd, codes)
    ctx.epilogue, ctx.eps, ctx.training = epilogue, eps, training


def saved(ctx: Any) -> Normalized:
    """What ``save`` kept."""
    x, weight, bias, residual, mean, invstd, codes = ctx.saved_tensors
    return Normalized(Call(x, weight, bias, residual, ctx.epilogue, ctx.eps), mean, invstd, codes)


# --- derivatives ------------------------------------------------------------------------------------------


def first_order(
    backend: Backend, grad: Tensor, normalized: Normalized, training: bool, needs: Needs
) -> Gradients:
    """The gradients of ``x``, weight, bias and residual from one backend's kernels; None where not needed."""
    call, mean, invstd, codes = normalized
    grad = like(grad, call.x)
    given = Normalized(kernel_call(call, mean.dtype), mean, invstd, codes)
    dx = dweight = dbias = dresidual = None
    if training and (needs.x or needs.residual):
        dx, dweight, dbias, dresidual = backend.backward(grad, given, needs.residual)
    else:
        if needs.affine or training:
            dbias, dweight = backend.backward_reduce(grad, given)
        if not training and (needs.x or needs.residual):
            zero = torch.zeros_like(mean)
            dx, dresidual = backend.backward_apply(grad, given, (zero, zero), needs.residual)
    if call.weight is not None and dweight is not None and dweight.dtype is not call.weight.dtype:
        dweight = dweight.to(call.weight.dtype)
    if call.bias is not None and dbias is not None and dbias.dtype is not call.bias.dtype:
        dbias = dbias.to(call.bias.dtype)
    return dx, dweight, dbias, dresidual


def second_order(
    grad: Tensor, normalized: Normalized, training: bool, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The same gradients with a graph behind them: torch's operators, recomputed and differentiated."""
    x, weight, bias, residual, epilogue, eps = normalized.call
    if training:
        out = epilogue.apply(F.batch_norm(x, None, None, weight, bias, True, 0.0, eps), residual)
    else:
        out = affine(normalized)
    return differentiate(out, (x, weight, bias, residual), needs, grad)


def differentiate(
    out: Tensor, inputs: tuple[Tensor | None, ...], needs: tuple[bool, ...], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of those inputs that need one, themselves differentiable."""
    wanted = [t if need else None for t, need in zip(inputs, needs, strict=True)]
    found = iter(torch.autograd.grad(out, [t for t in wanted if t is not None], grad, create_graph=True))
    return tuple(None if t is None else next(found) for t in wanted)


def backward(
    ctx: Any, grad: Tensor | None, needs: tuple[bool, bool, bool, bool], gradients: FirstOrder
) -> tuple[Tensor | None, ...]:
    """Apply the rule.

    Args:
        ctx: what ``save`` filled.
        grad: the gradient at the output, or None if nothing arrived.
        needs: which of ``x``, weight, bias and residual want a gradient.
        gradients: what computes the first derivatives.
    """
    if grad is None:
        return None, None, None, None
    need_x, need_weight, need_bias, need_residual = needs
    added = grad if ctx.only_added and need_residual else None
    need_residual = need_residual and not ctx.only_added
    if not (need_x or need_weight or need_bias or need_residual):
        return None, None, None, added
    if torch.is_grad_enabled():
        found = second_order(grad, saved(ctx), ctx.training, (need_x, need_weight, need_bias, need_residual))
        return found[0], found[1], found[2], added if ctx.only_added else found[3]
    wanted = Needs(need_x, need_weight or need_bias, need_residual)
    dx, dweight, dbias, dresidual = gradients(grad, saved(ctx), ctx.training, wanted)
    return (
        dx if need_x else None,
        dweight if need_weight else None,
        dbias if need_bias else None,
        dresidual if need_residual else added,
    )


# --- the kernels, called directly -------------------------------------------------------------------------


class _Train(torch.autograd.Function):
    """Normalise with the batch's statistics, which leave through ``statistics``: they carry no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: tuple[Backend, Epilogue, float, list[Tensor]],
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        backend, epilogue, eps, statistics = plan
        codes = backend.codes_of(x, epilogue.pool) if isinstance(epilogue.pool, MaxPool) else None
        call = Call(x, weight, bias, residual, epilogue, eps)
        out, mean, var, invstd = backend.forward_train(kernel_call(call), codes)
        statistics += (mean, var)
        ctx.backend, ctx.output = backend, None
        save(ctx, Normalized(call, mean, invstd, codes), True)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        return None, *backward(ctx, grad, ctx.needs_input_grad[1:], partial(first_order, ctx.backend))


class _Apply(torch.autograd.Function):
    """Normalise with statistics that are given and are constants."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: tuple[Backend, Epilogue, Tensor, Tensor],
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        backend, epilogue, mean, invstd = plan
        codes = backend.codes_of(x, epilogue.pool) if isinstance(epilogue.pool, MaxPool) else None
        call = Call(x, weight, bias, residual, epilogue, 0.0)
        out = backend.forward(Normalized(kernel_call(call), mean, invstd, codes))
        ctx.backend, ctx.output = backend, None
        save(ctx, Normalized(call, mean, invstd, codes), False)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        return None, *backward(ctx, grad, ctx.needs_input_grad[1:], partial(first_order, ctx.backend))


def _needs_graph(call: Call) -> bool:
    if not torch.is_grad_enabled():
        return False
    x, weight, bias, residual, _, _ = call
    return bool(
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )


def train(backend: Backend, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(out, mean, biased var)``; only ``out`` is differentiable."""
    if not _needs_graph(call):
        return backend.forward_train(kernel_call(call))[:3]
    x, weight, bias, residual, epilogue, eps = call
    statistics: list[Tensor] = []
    differentiable: Any = _Train.apply
    out = differentiable((backend, epilogue, eps, statistics), x, weight, bias, residual)
    mean, var = statistics
    return out, mean, var


def apply(backend: Backend, normalized: Normalized) -> Tensor:
    """Normalise with the statistics given: float32, constants."""
    call, mean, invstd, _ = normalized
    if not _needs_graph(call):
        return backend.forward(Normalized(kernel_call(call), mean, invstd))
    x, weight, bias, residual, epilogue, _ = call
    differentiable: Any = _Apply.apply
    out: Tensor = differentiable((backend, epilogue, mean, invstd), x, weight, bias, residual)
    return out
