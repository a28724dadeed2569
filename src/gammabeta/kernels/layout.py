"""Memory layouts: a kernel reads contiguous ``(N, C, S)`` or channels_last ``(N, S, C)``, nothing else."""

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ..epilogue import MaxPool as MaxPool  # pickles of version 0.1.0 name it here
from .backend import Call

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def is_channels_last(x: Tensor) -> bool:
    """Whether ``(N, S, C)`` lies in memory without gaps; also in dimensions torch has no name for it."""
    form = _CHANNELS_LAST.get(x.dim())
    if form is not None:
        return x.is_contiguous(memory_format=form)
    return x.dim() > 2 and x.movedim(1, -1).is_contiguous()


def is_rows(x: Tensor) -> bool:
    """Whether the channels of a dense tensor lie side by side: (N, C) too, and one value a plane."""
    if x.is_contiguous():
        return x.numel() == x.shape[0] * x.shape[1]
    return is_channels_last(x)


def dense(x: Tensor) -> Tensor:
    """``x`` itself where a kernel can read it, else a copy in the layout torch would give the output."""
    if x.is_contiguous() or is_channels_last(x):
        return x
    form = suggest_memory_format(x) if x.dim() in _CHANNELS_LAST else torch.contiguous_format
    return x.contiguous(memory_format=form)


def like(t: Tensor, x: Tensor) -> Tensor:
    """``t`` in the layout of ``x``, which is dense; copied only where it differs."""
    if x.is_contiguous():
        return t.contiguous()
    form = _CHANNELS_LAST.get(x.dim())
    if form is not None:
        return t.contiguous(memory_format=form)
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def readable(call: Call) -> Call:
    """The call with its large tensors in one layout that kernels read."""
    x, weight, bias, residual, epilogue, eps = call
    x = dense(x)
    return Call(x, weight, bias, None if residual is None else like(residual, x), epilogue, eps)


def empty(shape: tuple[int, ...], x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor of this shape in the layout and device of ``x``, and in its dtype if None."""
    if x.is_contiguous():
        return x.new_empty(shape, dtype=dtype)
    form = _CHANNELS_LAST.get(x.dim())
    if form is not None:
        return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=form)
    return x.new_empty((shape[0], *shape[2:], shape[1]), dtype=dtype).movedim(-1, 1)
