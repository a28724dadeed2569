"""torch's own road: ``F.batch_norm`` and what follows it, one operator after the other.

Serves every dtype, device, tensor subclass and transform; autograd, ``torch.func`` and ``torch.export`` see
nothing but ATen operators. Each kernel is a faster way to say the same thing.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.layout import MaxPool, Pool

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
}


def finish(out: Tensor, residual: Any, activation: str | None, pool: Pool) -> Tensor:
    """``pool(activation(out + residual))``; broadcasting and type promotion are torch's."""
    if residual is not None:
        out = out + residual
    if activation is not None:
        out = ACTIVATIONS[activation](out)
    return pooled(out, pool)


def pooled(out: Tensor, pool: Pool) -> Tensor:
    """The mean over squares, or the greatest of windows."""
    if isinstance(pool, MaxPool):
        found: Tensor = F.max_pool2d(out, pool.kernel, pool.stride, pool.padding)
        return found
    return out if pool is None else F.avg_pool2d(out, pool)


def finish_in_place(out: Tensor, residual: Any, activation: str | None, pool: Pool) -> Tensor:
    """The same in the memory of ``out``, which nobody else holds, where autograd and the shapes allow it."""
    if residual is None and pool is None:
        if activation is None:
            return out
        return out.relu_() if activation == "relu" else ACTIVATIONS[activation](out)
    if isinstance(residual, Tensor) and residual.shape == out.shape and residual.dtype is out.dtype:
        out += residual
        residual = None
    if activation == "relu" and residual is None:
        out, activation = out.relu_(), None
    return finish(out, residual, activation, pool)


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str | None,
    residual: Any,
    pool: Pool,
) -> Tensor:
    """Exactly ``F.batch_norm``, running statistics included, then ``finish``."""
    out = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return finish(out, residual, activation, pool)


def train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Any,
    eps: float,
    activation: str | None,
    pool: Pool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise with the batch's own statistics and return them: ``(out, mean, unbiased var)``.

    ``F.batch_norm`` gives its statistics away only as running ones: with momentum 1 those are the batch's.
    """
    kind = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    if weight is not None:
        kind = weight.dtype
    elif bias is not None:
        kind = bias.dtype
    mean = torch.zeros(x.shape[1], dtype=kind, device=x.device)
    var = torch.zeros(x.shape[1], dtype=kind, device=x.device)
    out = F.batch_norm(x, mean, var, weight, bias, True, 1.0, eps)
    return finish(out, residual, activation, pool), mean, var


def affine(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Any,
    activation: str | None,
    pool: Pool,
) -> Tensor:
    """Normalise with statistics that are given, in the dtype of ``x``: differentiable any number of times."""
    shape = (1, -1, *[1] * (x.dim() - 2))
    z = (x.to(mean.dtype) - mean.view(shape)) * invstd.view(shape)
    if weight is not None:
        z = z * weight.to(z.dtype).view(shape)
    if bias is not None:
        z = z + bias.to(z.dtype).view(shape)
    return finish(z.to(x.dtype), residual, activation, pool)
