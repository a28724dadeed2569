"""Running statistics: ``running = (1 - factor) * running + factor * batch``, ``factor`` weighs the new.

The batch's variance is biased where it normalises and unbiased where it is stored, as in PyTorch.
"""

from typing import Any

import torch
from torch import Tensor

from .route import kernels


def update(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    unbiased_var: Tensor,
    factor: float | Tensor,
    skip_nonfinite: bool,
) -> bool | Tensor:
    """Update both in place with torch's operators; no value is read back, so no device waits.

    Returns:
        True, or with ``skip_nonfinite`` a boolean tensor ``()``: whether the batch was finite and counted.
    """
    with torch.no_grad():
        mean, unbiased_var = mean.detach(), unbiased_var.detach()
        new_mean = mean.to(running_mean.dtype) * factor + running_mean * (1 - factor)
        new_var = unbiased_var.to(running_var.dtype) * factor + running_var * (1 - factor)
        accepted: bool | Tensor = True
        if skip_nonfinite:
            accepted = torch.isfinite(mean).all() & torch.isfinite(unbiased_var).all()
            new_mean = torch.where(accepted, new_mean, running_mean)
            new_var = torch.where(accepted, new_var, running_var)
        running_mean.copy_(new_mean)
        running_var.copy_(new_var)
    return accepted


def update_small(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, unbiased_var: Tensor, factor: float
) -> bool | Tensor:
    """The same on the CPU, skipping a non-finite batch, with one short call instead of ten."""
    kernel = kernels("cpu")
    if isinstance(kernel, str) or running_mean.dtype is not torch.float32:
        return update(running_mean, running_var, mean, unbiased_var, factor, True)
    # No correction is wanted for a variance that is unbiased already: that is what endless values give.
    accepted: bool = kernel.update_running(
        running_mean, running_var, mean, unbiased_var, 1 << 53, factor, True
    )
    return accepted


def update_fused(
    kernel: Any,
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    count: int,
    factor: float | Tensor,
    skip_nonfinite: bool,
) -> bool | Tensor:
    """The same from the biased variance of ``count`` values, by the kernel where it can."""
    plain = (
        running_mean.dtype is torch.float32 and running_mean.is_contiguous() and running_var.is_contiguous()
    )
    if plain and not isinstance(factor, Tensor):
        accepted: bool | Tensor = kernel.update_running(
            running_mean, running_var, mean, var, count, factor, skip_nonfinite
        )
        return accepted
    return update(running_mean, running_var, mean, var * (count / (count - 1)), factor, skip_nonfinite)
