"""The autograd rule, one for every backend: what is saved, how it is differentiated once, and twice.

Saved are ``x``, the per-channel statistics and parameters, the residual where an activation needs it to
recompute its mask, and for max pooling a byte an output: which of its window it is. The first derivative is
the kernels'. The second, asked for with ``create_graph=True``, is that of torch's operators, rebuilt from
what was saved.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.layout import MaxPool, Pool, like
from . import torch_path

# x, weight, bias, residual, mean, invstd, codes
Saved = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor, Tensor | None]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def single(t: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """A per-channel parameter as the kernels read it: float32, contiguous."""
    if t is None or (t.dtype is dtype and t.is_contiguous()):
        return t
    return t.to(dtype).contiguous()


def first_order(
    kernel: Any,
    grad: Tensor,
    saved: Saved,
    activation: str | None,
    pool: Pool,
    training: bool,
    need_x: bool,
    need_affine: bool,
    need_residual: bool,
) -> Gradients:
    """The gradients of ``x``, weight, bias and residual from one backend's kernels; None where not needed."""
    x, weight, bias, residual, mean, invstd, codes = saved
    kind = mean.dtype
    grad = like(grad, x)
    w, b = single(weight, kind), single(bias, kind)
    dx = dweight = dbias = dresidual = None
    more = {} if codes is None else {"codes": codes}  # no other backend knows of them
    if training and (need_x or need_residual):
        dx, dweight, dbias, dresidual = kernel.backward(
            grad, x, mean, invstd, w, b, residual, activation, pool, need_residual, **more
        )
    else:
        call = (grad, x, mean, invstd, w, b, residual, activation, pool)
        if need_affine or training:
            dbias, dweight = kernel.backward_reduce(*call, **more)
        if not training and (need_x or need_residual):
            zero = torch.zeros_like(mean)
            dx, dresidual = kernel.backward_apply(*call, zero, zero, need_residual, **more)
    if w is not weight and dweight is not None:
        dweight = dweight.to(weight.dtype)  # type: ignore[union-attr]
    if b is not bias and dbias is not None:
        dbias = dbias.to(bias.dtype)  # type: ignore[union-attr]
    return dx, dweight, dbias, dresidual


def second_order(
    grad: Tensor,
    saved: Saved,
    activation: str | None,
    pool: Pool,
    training: bool,
    eps: float,
    needs: tuple[bool, bool, bool, bool],
) -> list[Tensor | None]:
    """The same gradients with a graph behind them: torch's operators, recomputed and differentiated."""
    x, weight, bias, residual, mean, invstd, _ = saved
    if training:
        out = F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
        out = torch_path.finish(out, residual, activation, pool)
    else:
        out = torch_path.affine(x, mean, invstd, weight, bias, residual, activation, pool)
    wanted = [t if need else None for t, need in zip((x, weight, bias, residual), needs, strict=True)]
    inputs = [t for t in wanted if t is not None]
    found = iter(torch.autograd.grad(out, inputs, grad, create_graph=True))
    return [None if t is None else next(found) for t in wanted]


def codes_of(kernel: Any, x: Tensor, pool: Pool) -> dict[str, Tensor]:
    """Memory for what max pooling passes on to its backward pass, by name; nothing for other calls."""
    return {"codes": kernel.codes_of(x, pool)} if isinstance(pool, MaxPool) else {}


def save(
    ctx: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    activation: str | None,
    pool: Pool,
    training: bool,
    eps: float,
    codes: Tensor | None = None,
) -> None:
    """Keep what ``backward`` reads; not a residual that is only added: its gradient is the upstream one."""
    only_added = residual is not None and activation is None and pool is None
    ctx.save_for_backward(x, weight, bias, None if only_added else residual, mean, invstd, codes)
    ctx.settings = (activation, pool, training, eps, only_added)


def backward(
    ctx: Any, grad: Tensor | None, needs: tuple[bool, bool, bool, bool], kernel: Any, gradients: Any
) -> tuple[Tensor | None, ...]:
    """Apply the rule.

    Args:
        ctx: what ``save`` filled.
        grad: the gradient at the output, or None if nothing arrived.
        needs: which of ``x``, weight, bias and residual want a gradient.
        kernel: what ``gradients`` takes first.
        gradients: ``first_order``, or what stands for it in a graph.
    """
    if grad is None:
        return None, None, None, None
    activation, pool, training, eps, only_added = ctx.settings
    need_x, need_weight, need_bias, need_residual = needs
    added = grad if only_added and need_residual else None
    need_residual = need_residual and not only_added
    if torch.is_grad_enabled():
        needs = (need_x, need_weight, need_bias, need_residual)
        if any(needs):
            found = second_order(grad, ctx.saved_tensors, activation, pool, training, eps, needs)
            return found[0], found[1], found[2], added if only_added else found[3]
        return None, None, None, added
    need_affine = need_weight or need_bias
    if not (need_x or need_affine or need_residual):
        return None, None, None, added
    dx, dweight, dbias, dresidual = gradients(
        kernel, grad, ctx.saved_tensors, activation, pool, training, need_x, need_affine, need_residual
    )
    return (
        dx if need_x else None,
        dweight if need_weight else None,
        dbias if need_bias else None,
        dresidual if need_residual else added,
    )
