"""What may be passed: torch's own checks are left to torch, so that its words are always its own."""

from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..kernels.layout import MaxPool, Pool
from .torch_path import ACTIVATIONS

BACKENDS = ("auto", "cpu", "gpu", "torch")


def check_settings(activation: str | None, pool: Pool) -> None:
    """Refuse an activation or a pool that does not exist.

    Raises:
        UsageError: saying what there is.
    """
    if activation is not None and activation not in ACTIVATIONS:
        raise UsageError(f"activation must be None or one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    if isinstance(pool, MaxPool):
        _check_windows(pool)
    elif pool is not None and pool != 2:
        raise UsageError(f"pool must be None, 2 (the 2x2 mean) or a MaxPool, got {pool!r}")


def _check_windows(pool: MaxPool) -> None:
    kernel, stride, padding = pool
    if any(type(n) is not int for n in pool) or kernel < 1 or stride < 1 or not 0 <= padding <= kernel // 2:
        raise UsageError(
            "MaxPool needs kernel and stride of at least 1 and padding of at most half the kernel, "
            f"got kernel={kernel!r}, stride={stride!r}, padding={padding!r}"
        )


def check_extras(x: Tensor, activation: str | None, pool: Pool, backend: str = "auto") -> None:
    """The same for a call: the pool's input, and the backend, too.

    Raises:
        UsageError: saying what there is.
    """
    check_settings(activation, pool)
    if pool is not None and x.dim() != 4:
        raise UsageError(f"pool={pool} needs a 4D input (N, C, H, W), got {x.dim()}D input")
    if backend not in BACKENDS:
        raise UsageError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")


def irregular(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: Any,
    eps: float,
) -> bool:
    """Whether ``torch.nn.functional.batch_norm`` refuses this call, or treats it as a special case.

    Such a call is handed to torch whatever backend was asked for, and torch answers for itself.
    """
    if x.dim() < 2 or x.numel() == 0:
        return True
    channels = x.shape[1]
    if training:
        if x.numel() == channels or eps <= 0.0 or (running_mean is None) != (running_var is None):
            return True
    elif running_mean is None or running_var is None or eps < 0.0:
        return True
    if not isinstance(momentum, float | int | torch.SymFloat):
        return True
    storage, device, on_cpu = x.dtype, x.device, x.is_cpu
    kind = None
    for tensor in (running_mean, running_var, weight, bias):
        if tensor is None:
            continue
        if tensor.dim() != 1 or tensor.numel() != channels:
            return True
        if tensor.is_cpu is not on_cpu or not (on_cpu or tensor.device == device):
            return True
        if kind is None:
            kind = tensor.dtype
            if kind is not storage and kind is not torch.float32:
                return True
        elif tensor.dtype is not kind:
            return True
    return False
