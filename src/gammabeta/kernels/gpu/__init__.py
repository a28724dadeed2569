"""Batch normalization on NVIDIA GPUs: what ``gammabeta.kernels`` promises, in Triton.

``plan`` cuts a tensor into tiles, ``tiles`` addresses them, ``forward_kernels`` and ``backward_kernels`` are
the kernels, ``host`` launches them. With ``TRITON_INTERPRET=1`` in the environment before Triton is imported,
the same kernels run in Triton's interpreter on CPU tensors: slowly, and only to be tested.

Launches go to the current stream of the tensor's device, whichever device is current; nothing waits for the
GPU, so a step can be captured in a CUDA graph (after one step outside it, which compiles the kernels).
"""

import os
from functools import cache

import torch
from torch import Tensor

from .host import (
    backward,
    backward_apply,
    backward_reduce,
    forward,
    forward_train,
    statistics,
    update_running,
)

__all__ = [
    "backward",
    "backward_apply",
    "backward_reduce",
    "forward",
    "forward_train",
    "statistics",
    "unsupported",
    "update_running",
]

ACTIVATIONS = (None, "relu", "relu6", "leaky_relu", "silu", "hardswish", "gelu")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (8, 0)  # Triton's own minimum, and the first with bfloat16


@cache
def _unfit_device(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device; the answer cannot change while the process lives."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return (
            None
            if device.type == "cpu"
            else "Triton's interpreter (TRITON_INTERPRET=1) runs on CPU tensors only"
        )
    if device.type != "cuda":
        if torch.cuda.is_available():
            return f"the tensor is on {device}, the Triton kernels read CUDA tensors; use .to('cuda')"
        if torch.version.cuda is None:
            return "this PyTorch was built without CUDA; install a CUDA build from pytorch.org"
        return "PyTorch finds no CUDA device; check the driver with nvidia-smi and CUDA_VISIBLE_DEVICES"
    if torch.version.hip is not None:
        return "the kernels are written and checked for NVIDIA GPUs; this PyTorch is built for ROCm"
    if torch.cuda.get_device_capability(device) < _OLDEST:
        name = torch.cuda.get_device_name(device)
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"{name} has compute capability {found}; Triton needs 8.0 (Ampere) or newer"
    return None


def unsupported(x: Tensor, residual: Tensor | None, activation: str | None, pool: int | None) -> str | None:
    """Why these kernels cannot take the tensors, None if they can."""
    why = _unfit_device(x.device)
    if why is not None:
        return why
    if x.dtype not in _DTYPES:
        return f"the kernels store float32, bfloat16 and float16, not {str(x.dtype).removeprefix('torch.')}"
    if x.layout != torch.strided:
        return "the tensor is not strided"
    if x.dim() < 2:
        return "the tensor has no channels"
    if x.numel() == 0:
        return "the tensor is empty"
    if activation not in ACTIVATIONS:
        return f"no kernel has the activation {activation!r}"
    if pool is not None and (pool != 2 or x.dim() != 4 or min(x.shape[2:]) < 2):
        return "pooling is 2×2, over the last two of four dimensions"
    if residual is not None:
        if residual.shape != x.shape:
            return "the residual's shape is not the input's"
        if residual.dtype != x.dtype or residual.device != x.device:
            return "the residual's dtype or device is not the input's"
    return None
