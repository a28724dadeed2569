"""A backend in plain tensor operations: the shortest example of one, and what runs where no kernel can.

Statistics are float64 for float64 input, else float32. Its inputs must be regular (``step.irregular``). It is
registered for no device, so it is never chosen by itself.
"""

import torch
from torch import Tensor

from ..epilogue import NOTHING, Epilogue, Pool
from .backend import Call, Gradients, Normalized, Running


def statistics_dtype(x: Tensor) -> torch.dtype:
    """What the statistics of ``x`` are kept in."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _axes(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _along_channels(t: Tensor, x: Tensor) -> Tensor:
    return t.view(1, -1, *[1] * (x.dim() - 2))


def affine(normalized: Normalized) -> Tensor:
    """The whole call under the statistics given, in the dtype of ``x``; any derivative can be taken."""
    call, mean, invstd, _ = normalized
    x = call.x
    z = (x.to(mean.dtype) - _along_channels(mean, x)) * _along_channels(invstd, x)
    if call.weight is not None:
        z = z * _along_channels(call.weight.to(z.dtype), x)
    if call.bias is not None:
        z = z + _along_channels(call.bias.to(z.dtype), x)
    return call.epilogue.apply(z.to(x.dtype), call.residual)


def unsupported(x: Tensor, residual: Tensor | None, epilogue: Epilogue) -> str | None:
    """Nothing is unsupported."""
    return None


def codes_of(x: Tensor, pool: Pool) -> Tensor | None:
    """No codes: max pooling is torch's own."""
    return None


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, ``(C,)`` both."""
    var, mean = torch.var_mean(x.to(statistics_dtype(x)), _axes(x), correction=0)
    return mean, var


def forward(normalized: Normalized) -> Tensor:
    """Normalise with the statistics given."""
    with torch.no_grad():
        return affine(normalized)


def forward_train(call: Call, codes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalise with the batch's statistics: ``(out, mean, biased var, invstd)``."""
    with torch.no_grad():
        mean, var = statistics(call.x)
        invstd = (var + call.eps).rsqrt()
        return affine(Normalized(call, mean, invstd)), mean, var, invstd


def _dz(grad: Tensor, normalized: Normalized) -> tuple[Tensor, Tensor]:
    """The gradient at ``z``, by differentiating what follows it; and ``xhat``. Both in the wide dtype."""
    call, mean, invstd, _ = normalized
    x = call.x.to(mean.dtype)
    xhat = (x - _along_channels(mean, x)) * _along_channels(invstd, x)
    if call.epilogue == NOTHING:
        return grad.to(mean.dtype), xhat
    z = affine(Normalized(call._replace(x=x, epilogue=NOTHING), mean, invstd)).detach()
    with torch.enable_grad():
        out = call.epilogue.apply(z.requires_grad_())
        (dz,) = torch.autograd.grad(out, z, grad.to(mean.dtype))
    return dz, xhat


def backward_reduce(grad: Tensor, normalized: Normalized) -> tuple[Tensor, Tensor]:
    """The two sums of the backward pass, the gradients of bias and weight."""
    with torch.no_grad():
        dz, xhat = _dz(grad, normalized)
        return dz.sum(_axes(dz)), (dz * xhat).sum(_axes(dz))


def backward_apply(
    grad: Tensor, normalized: Normalized, means: tuple[Tensor, Tensor], need_residual: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of ``x`` and of the residual (Ioffe and Szegedy 2015, section 3, simplified)."""
    with torch.no_grad():
        dz, xhat = _dz(grad, normalized)
        call, _, invstd, _ = normalized
        mean_dz, mean_dz_xhat = (_along_channels(mean, dz) for mean in means)
        slope = invstd if call.weight is None else invstd * call.weight.to(invstd.dtype)
        dx = (dz - mean_dz - xhat * mean_dz_xhat) * _along_channels(slope, dz)
        return dx.to(call.x.dtype), dz.to(call.x.dtype) if need_residual else None


def backward(grad: Tensor, normalized: Normalized, need_residual: bool) -> Gradients:
    """Both steps in one: ``(dx, dweight, dbias, dresidual)``."""
    sum_dz, sum_dz_xhat = backward_reduce(grad, normalized)
    x = normalized.call.x
    count = x.numel() // x.shape[1]
    means = (sum_dz / count, sum_dz_xhat / count)
    dx, dresidual = backward_apply(grad, normalized, means, need_residual)
    return dx, sum_dz_xhat, sum_dz, dresidual


def update_running(running: Running, mean: Tensor, var: Tensor, count: int) -> bool | Tensor:
    """Enter a batch of ``count`` values a channel, whose variance is biased."""
    return enter(running, mean, var * (count / (count - 1)))


def enter(running: Running, mean: Tensor, unbiased_var: Tensor) -> bool | Tensor:
    """``running = (1 - factor) * running + factor * batch``, in place; the batch's variance is unbiased here.

    No value is read back, so no device waits.

    Returns:
        True, or with ``skip_nonfinite`` a boolean tensor ``()``: whether the batch was finite and counted.
    """
    running_mean, running_var, factor, skip_nonfinite = running
    if running_mean is None or running_var is None:
        return True
    with torch.no_grad():
        mean, unbiased_var = mean.detach(), unbiased_var.detach()
        # Statistics kept in half precision are rounded once, when they are stored.
        wide = torch.promote_types(running_mean.dtype, torch.float32)
        new_mean = mean.to(wide) * factor + running_mean.to(wide) * (1 - factor)
        new_var = unbiased_var.to(wide) * factor + running_var.to(wide) * (1 - factor)
        accepted: bool | Tensor = True
        if skip_nonfinite:
            accepted = torch.isfinite(mean).all() & torch.isfinite(unbiased_var).all()
            new_mean = torch.where(accepted, new_mean, running_mean.to(wide))
            new_var = torch.where(accepted, new_var, running_var.to(wide))
        running_mean.copy_(new_mean)
        running_var.copy_(new_var)
    return accepted
