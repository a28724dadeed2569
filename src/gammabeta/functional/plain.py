"""The kernels' contract in tensor operations: what runs where a piece is asked for that no kernel has.

Same functions, same meaning as ``gammabeta.kernels``; statistics are float64 for float64 input, else float32.
"""

import torch
from torch import Tensor

from ..kernels.layout import Pool
from . import torch_path


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _axes(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def unsupported(x: Tensor, residual: Tensor | None, activation: str | None, pool: Pool) -> str | None:
    """Nothing is unsupported."""
    return None


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, ``(C,)`` both."""
    var, mean = torch.var_mean(x.to(_wide(x)), _axes(x), correction=0)
    return mean, var


def forward(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    pool: Pool,
) -> Tensor:
    """Normalise with the statistics given."""
    with torch.no_grad():
        return torch_path.affine(x, mean, invstd, weight, bias, residual, activation, pool)


def forward_train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
    pool: Pool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalise with the batch's statistics: ``(out, mean, biased var, invstd)``."""
    with torch.no_grad():
        mean, var = statistics(x)
        invstd = (var + eps).rsqrt()
        return forward(x, mean, invstd, weight, bias, residual, activation, pool), mean, var, invstd


def _dz(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    pool: Pool,
) -> tuple[Tensor, Tensor]:
    """The gradient at ``z``, by differentiating what follows it; and ``xhat``. Both in wide dtype."""
    shape = (1, -1, *[1] * (x.dim() - 2))
    xhat = (x.to(mean.dtype) - mean.view(shape)) * invstd.view(shape)
    if activation is None and pool is None:
        return grad.to(mean.dtype), xhat
    z = torch_path.affine(x.to(mean.dtype), mean, invstd, weight, bias, residual, None, None).detach()
    with torch.enable_grad():
        out = torch_path.finish(z.requires_grad_(), None, activation, pool)
        (dz,) = torch.autograd.grad(out, z, grad.to(mean.dtype))
    return dz, xhat


def backward_reduce(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    pool: Pool,
) -> tuple[Tensor, Tensor]:
    """The two sums of the backward pass, the gradients of bias and weight."""
    with torch.no_grad():
        dz, xhat = _dz(grad, x, mean, invstd, weight, bias, residual, activation, pool)
        return dz.sum(_axes(x)), (dz * xhat).sum(_axes(x))


def backward_apply(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    pool: Pool,
    mean_dz: Tensor,
    mean_dz_xhat: Tensor,
    need_residual: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of ``x`` and of the residual (Ioffe and Szegedy 2015, section 3, simplified)."""
    with torch.no_grad():
        dz, xhat = _dz(grad, x, mean, invstd, weight, bias, residual, activation, pool)
        shape = (1, -1, *[1] * (x.dim() - 2))
        slope = invstd if weight is None else invstd * weight.to(invstd.dtype)
        dx = (dz - mean_dz.view(shape) - xhat * mean_dz_xhat.view(shape)) * slope.view(shape)
        return dx.to(x.dtype), dz.to(x.dtype) if need_residual else None


def backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    pool: Pool,
    need_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Both steps in one: ``(dx, dweight, dbias, dresidual)``."""
    call = (grad, x, mean, invstd, weight, bias, residual, activation, pool)
    sum_dz, sum_dz_xhat = backward_reduce(*call)
    count = x.numel() // x.shape[1]
    dx, dresidual = backward_apply(*call, sum_dz / count, sum_dz_xhat / count, need_residual)
    return dx, sum_dz_xhat, sum_dz, dresidual
