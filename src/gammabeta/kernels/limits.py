"""What no kernel takes, whichever backend it is of."""

import torch
from torch import Tensor

from ..epilogue import MaxPool, Pool, pooled_shape

LARGEST_WINDOW = 256  # elements: which of them was the greatest is kept in a byte
ACTIVATIONS = (None, "relu", "relu6", "leaky_relu", "silu", "hardswish", "gelu")


def unfit(
    x: Tensor,
    residual: Tensor | None,
    activation: str | None,
    pool: Pool,
    dtypes: tuple[torch.dtype, ...],
    *,
    windows: bool = False,
) -> str | None:
    """Why a backend that stores ``dtypes`` cannot take the tensors, None if it can.

    ``windows`` says whether it has max pooling.
    """
    if x.dtype not in dtypes:
        stored = ", ".join(_name(dtype) for dtype in dtypes)
        return f"the kernels store {stored}, not {_name(x.dtype)}"
    if x.layout != torch.strided:
        return "the tensor is not strided"
    if x.dim() < 2:
        return "the tensor has no channels"
    if x.numel() == 0:
        return "the tensor is empty"
    if activation not in ACTIVATIONS:
        return f"no kernel has the activation {activation!r}"
    if pool is not None:
        why = _unpooled(x, pool, windows)
        if why is not None:
            return why
    if residual is not None:
        if residual.shape != x.shape:
            return "the residual's shape is not the input's"
        if residual.dtype != x.dtype or residual.device != x.device:
            return "the residual's dtype or device is not the input's"
    return None


def _unpooled(x: Tensor, pool: Pool, windows: bool) -> str | None:
    if x.dim() != 4:
        return "pooling is over the last two of four dimensions"
    if isinstance(pool, MaxPool):
        if not windows:
            return "these kernels have no max pooling"
        if pool.kernel**2 > LARGEST_WINDOW:
            return f"a window has more than {LARGEST_WINDOW} elements"
    elif pool != 2:
        return "pooling is the mean over 2×2, or a MaxPool"
    return None if min(pooled_shape(x.shape, pool)[2:]) > 0 else "the input is smaller than the pool's window"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
