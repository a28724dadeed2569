"""The kernels as operators of ``torch.library``: what ``torch.compile`` puts into its graphs.

Each operator is functional: it returns new tensors and changes nothing. The running statistics are updated
beside it with torch's own operators, which the compiler can see.
"""

from typing import Any

import torch
from torch import Tensor

from ..epilogue import Epilogue, pooled_shape
from ..kernels import backend as backends
from ..kernels import tensors
from ..kernels.backend import Backend, Call, Normalized
from ..kernels.layout import dense, empty, like, readable
from . import autograd
from .autograd import Needs, kernel_call

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


def _backend(call: Call) -> Backend:
    """The backend of this device, or tensor operations where it cannot serve."""
    name = backends.for_device(call.x.device.type)
    found: Any = tensors if name is None else backends.load(name)
    unfit = isinstance(found, str) or backends.unfit(call.x, call.residual, call.epilogue.pool) is not None
    if unfit or found.unsupported(call.x, call.residual, call.epilogue) is not None:
        return tensors
    chosen: Backend = found
    return chosen


# --- what they compute: the arguments come in the order of the schema -------------------------------------


def _train(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, weight, bias, residual, eps, activation, pool = arguments
    call = readable(Call(x, weight, bias, residual, Epilogue(activation, pool), eps))
    out, mean, var, invstd = _backend(call).forward_train(kernel_call(call, tensors.statistics_dtype(x)))
    return like(out, call.x), mean, var, invstd


def _apply(*arguments: Any) -> Tensor:
    x, mean, invstd, weight, bias, residual, activation, pool = arguments
    call = readable(Call(x, weight, bias, residual, Epilogue(activation, pool), 0.0))
    normalized = Normalized(kernel_call(call, mean.dtype), mean, invstd)
    return like(_backend(call).forward(normalized), call.x)


def _backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad, x, weight, bias, residual, mean, invstd, activation, pool, training, *wanted = arguments
    needs = Needs(*wanted)
    call = readable(Call(x, weight, bias, residual, Epilogue(activation, pool), 0.0))
    found = autograd.first_order(_backend(call), grad, Normalized(call, mean, invstd), training, needs)
    sums = _needs_sums(training, needs)
    dx = like(found[0], call.x) if needs.x and found[0] is not None else x.new_empty(0)
    dweight = found[1] if sums and found[1] is not None else mean.new_empty(0)
    dbias = found[2] if sums and found[2] is not None else mean.new_empty(0)
    dresidual = like(found[3], call.x) if needs.residual and found[3] is not None else x.new_empty(0)
    return dx, dweight, dbias, dresidual


def _needs_sums(training: bool, needs: Needs) -> bool:
    return needs.affine or (training and not needs.x and not needs.residual)


# --- their shapes and dtypes ------------------------------------------------------------------------------


def _train_fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, var, invstd = (x.new_empty(x.shape[1], dtype=tensors.statistics_dtype(x)) for _ in range(3))
    return _apply_fake(x, *rest), mean, var, invstd


def _apply_fake(x: Tensor, *rest: Any) -> Tensor:
    x = dense(x)
    return empty(pooled_shape(tuple(x.shape), rest[-1]), x)


def _backward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, x, weight, bias, _, mean, _, _, _, training, *wanted = arguments
    x, needs = dense(x), Needs(*wanted)
    size = mean.shape if _needs_sums(training, needs) else 0
    dweight, dbias = (
        mean.new_empty(size, dtype=mean.dtype if t is None else t.dtype) for t in (weight, bias)
    )
    dx = torch.empty_like(x) if needs.x else x.new_empty(0)
    return dx, dweight, dbias, torch.empty_like(x) if needs.residual else x.new_empty(0)


for _name, _real, _fake in (
    ("batch_norm_train", _train, _train_fake),
    ("batch_norm_apply", _apply, _apply_fake),
    ("batch_norm_backward", _backward, _backward_fake),
):
    _LIBRARY.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gammabeta::{_name}", _fake, lib=_LIBRARY)


# --- their derivatives ------------------------------------------------------------------------------------


def _in_graph(
    grad: Tensor, normalized: Normalized, training: bool, needs: Needs
) -> tuple[Tensor | None, ...]:
    """``autograd.first_order`` as an operator, so that a traced backward pass is one node."""
    (x, weight, bias, residual, (activation, pool), _), mean, invstd, _ = normalized
    operator: Any = torch.ops.gammabeta.batch_norm_backward
    found: tuple[Tensor, ...] = operator(
        grad, x, weight, bias, residual, mean, invstd, activation, pool, training, *needs
    )
    return found


def _save_train(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, residual, eps, activation, pool = inputs
    _, mean, var, invstd = output
    ctx.mark_non_differentiable(mean, var, invstd)
    call = Call(x, weight, bias, residual, Epilogue(activation, pool), eps)
    autograd.save(ctx, Normalized(call, mean, invstd), True)


def _differentiate_train(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    return *autograd.backward(ctx, grad, ctx.needs_input_grad[:4], _in_graph), None, None, None


def _save_apply(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mean, invstd, weight, bias, residual, activation, pool = inputs
    call = Call(x, weight, bias, residual, Epilogue(activation, pool), 0.0)
    autograd.save(ctx, Normalized(call, mean, invstd), False)


def _differentiate_apply(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad
    found = autograd.backward(ctx, grad, (needs[0], *needs[3:6]), _in_graph)
    return (found[0], None, None, *found[1:], None, None)


torch.library.register_autograd(
    "gammabeta::batch_norm_train", _differentiate_train, setup_context=_save_train, lib=_LIBRARY
)
torch.library.register_autograd(
    "gammabeta::batch_norm_apply", _differentiate_apply, setup_context=_save_apply, lib=_LIBRARY
)
