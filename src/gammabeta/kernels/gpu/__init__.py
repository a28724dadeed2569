"""Batch normalization on NVIDIA GPUs: the functions of ``kernels.backend.Backend``, in Triton.

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

from ...epilogue import Epilogue, Pool
from ..backend import lacking, unfit
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
    "codes_of",
    "forward",
    "forward_train",
    "statistics",
    "unsupported",
    "update_running",
]

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


def unsupported(x: Tensor, residual: Tensor | None, epilogue: Epilogue) -> str | None:
    """Why these kernels cannot take the tensors, None if they can."""
    why = _unfit_device(x.device)
    if why is not None:
        return why
    return unfit(x, residual, epilogue.pool) or lacking(x, epilogue, _DTYPES, max_pool=False)


def codes_of(x: Tensor, pool: Pool) -> Tensor | None:
    """No codes: these kernels have no max pooling."""
    return None
