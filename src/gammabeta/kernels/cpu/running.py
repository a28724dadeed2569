"""Running statistics, updated in place by one small kernel on the calling thread."""

import ctypes
import math

import torch
from torch import Tensor

from .arguments import pack
from .launch import call
from .registry import Key

_UPDATE = Key("update_running")


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    count: int,
    factor: float,
    skip_nonfinite: bool,
) -> bool:
    """Move the running statistics towards the batch's, in place; ``factor`` is the weight of the new.

    ``var`` is the batch's biased variance over ``count`` values; what is stored is the unbiased one. With
    ``skip_nonfinite`` a batch that has an infinite or NaN statistic changes nothing, and the answer is False.
    """
    if not (_plain(running_mean) and _plain(running_var)):
        return _update_by_torch(running_mean, running_var, mean, var, count, factor, skip_nonfinite)
    done = ctypes.c_int64(0)
    batch = (mean.data_ptr(), var.data_ptr(), 0, 0, 0)
    running_pair = (running_mean.data_ptr(), running_var.data_ptr(), 0, 0)
    sizes = (count, mean.numel(), 1, 1, 0, 1, 1, 1, 0, skip_nonfinite)
    args = pack(0, 0, 0, 0, 0, 0, 0, *batch, *running_pair, ctypes.addressof(done), 0, 0, *sizes, 0.0, factor)
    call(_UPDATE, args)
    return bool(done.value)


def _plain(t: Tensor) -> bool:
    return t.dtype is torch.float32 and t.is_contiguous()


def _update_by_torch(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    count: int,
    factor: float,
    skip_nonfinite: bool,
) -> bool:
    """The same for buffers of another dtype or layout."""
    with torch.no_grad():
        if skip_nonfinite and not bool(torch.isfinite(mean).all() & torch.isfinite(var).all()):
            return False
        unbiased = var.double() * (count / (count - 1)) if count > 1 else var * math.inf
        running_mean.copy_(running_mean.double() * (1 - factor) + mean.double() * factor)
        running_var.copy_(running_var.double() * (1 - factor) + unbiased * factor)
    return True
