"""The same as operators of ``torch.library``: what ``torch.compile`` puts into its graphs.

Each operator is functional: it returns new tensors and changes nothing. The running statistics are updated
beside it with torch's own operators, which the compiler can see.
"""

from typing import Any

import torch
from torch import Tensor

from ..kernels.layout import dense, empty, like, pooled
from . import autograd, plain
from .autograd import single
from .route import kernels

_LIBRARY = torch.library.Library("gammabeta", "DEF")
_TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)
_LIBRARY.define(
    "batch_norm_train(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, str? activation, "
    "int? pool) -> (Tensor out, Tensor mean, Tensor var, Tensor invstd)",
    tags=_TAGS,
)
_LIBRARY.define(
    "batch_norm_apply(Tensor x, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias, Tensor? residual, "
    "str? activation, int? pool) -> Tensor",
    tags=_TAGS,
)
_LIBRARY.define(
    "batch_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor mean, "
    "Tensor invstd, str? activation, int? pool, bool training, bool need_x, bool need_affine, "
    "bool need_residual) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
    tags=_TAGS,
)


def _kernel(x: Tensor, residual: Tensor | None, activation: str | None, pool: int | None) -> Any:
    """The backend of this device, or tensor operations where it cannot serve."""
    module = kernels("cpu") if x.is_cpu else kernels("gpu") if x.is_cuda else "no kernel"
    if isinstance(module, str) or module.unsupported(x, residual, activation, pool) is not None:
        return plain
    return module


def _train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
    pool: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = dense(x)
    residual = None if residual is None else like(residual, x)
    kernel = _kernel(x, residual, activation, pool)
    kind = torch.float64 if x.dtype is torch.float64 else torch.float32
    out, mean, var, invstd = kernel.forward_train(
        x, single(weight, kind), single(bias, kind), residual, eps, activation, pool
    )
    return like(out, x), mean, var, invstd


def _apply(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    pool: int | None,
) -> Tensor:
    x = dense(x)
    residual = None if residual is None else like(residual, x)
    kernel = _kernel(x, residual, activation, pool)
    weight, bias = single(weight, mean.dtype), single(bias, mean.dtype)
    return like(kernel.forward(x, mean, invstd, weight, bias, residual, activation, pool), x)


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    activation: str | None,
    pool: int | None,
    training: bool,
    need_x: bool,
    need_affine: bool,
    need_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = dense(x)
    residual = None if residual is None else like(residual, x)
    saved = (x, weight, bias, residual, mean, invstd, None)
    found = autograd.first_order(
        _kernel(x, residual, activation, pool),
        grad,
        saved,
        activation,
        pool,
        training,
        need_x,
        need_affine,
        need_residual,
    )
    need_reduced = need_affine or (training and not need_x and not need_residual)
    dx = like(found[0], x) if need_x and found[0] is not None else x.new_empty(0)
    dweight = found[1] if need_reduced and found[1] is not None else mean.new_empty(0)
    dbias = found[2] if need_reduced and found[2] is not None else mean.new_empty(0)
    dresidual = like(found[3], x) if need_residual and found[3] is not None else x.new_empty(0)
    return dx, dweight, dbias, dresidual


def _train_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
    pool: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = dense(x)
    kind = torch.float64 if x.dtype is torch.float64 else torch.float32
    mean, var, invstd = (x.new_empty(x.shape[1], dtype=kind) for _ in range(3))
    return empty(pooled(tuple(x.shape), pool), x), mean, var, invstd


def _apply_fake(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    pool: int | None,
) -> Tensor:
    x = dense(x)
    return empty(pooled(tuple(x.shape), pool), x)


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    activation: str | None,
    pool: int | None,
    training: bool,
    need_x: bool,
    need_affine: bool,
    need_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = dense(x)
    need_reduced = need_affine or (training and not need_x and not need_residual)
    sums = [
        mean.new_empty(mean.shape if need_reduced else 0, dtype=mean.dtype if t is None else t.dtype)
        for t in (weight, bias)
    ]
    dx = torch.empty_like(x) if need_x else x.new_empty(0)
    return dx, sums[0], sums[1], torch.empty_like(x) if need_residual else x.new_empty(0)


for _name, _real, _fake in (
    ("batch_norm_train", _train, _train_fake),
    ("batch_norm_apply", _apply, _apply_fake),
    ("batch_norm_backward", _backward, _backward_fake),
):
    _LIBRARY.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gammabeta::{_name}", _fake, lib=_LIBRARY)


def _in_graph(operator: Any, grad: Tensor, saved: autograd.Saved, *settings: Any) -> tuple[Tensor, ...]:
    """``autograd.first_order`` as an operator, so that a traced backward pass is one node."""
    found: tuple[Tensor, ...] = operator(grad, *saved[:6], *settings)
    return found


def _save_train(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, residual, eps, activation, pool = inputs
    _, mean, var, invstd = output
    ctx.mark_non_differentiable(mean, var, invstd)
    autograd.save(ctx, x, weight, bias, residual, mean, invstd, activation, pool, True, eps)


def _differentiate_train(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    operator = torch.ops.gammabeta.batch_norm_backward
    found = autograd.backward(ctx, grad, ctx.needs_input_grad[:4], operator, _in_graph)
    return (*found, None, None, None)


def _save_apply(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mean, invstd, weight, bias, residual, activation, pool = inputs
    autograd.save(ctx, x, weight, bias, residual, mean, invstd, activation, pool, False, 0.0)


def _differentiate_apply(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad
    operator = torch.ops.gammabeta.batch_norm_backward
    found = autograd.backward(ctx, grad, (needs[0], *needs[3:6]), operator, _in_graph)
    return (found[0], None, None, *found[1:], None, None)


torch.library.register_autograd(
    "gammabeta::batch_norm_train", _differentiate_train, setup_context=_save_train, lib=_LIBRARY
)
torch.library.register_autograd(
    "gammabeta::batch_norm_apply", _differentiate_apply, setup_context=_save_apply, lib=_LIBRARY
)
