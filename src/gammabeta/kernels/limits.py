"""What no kernel takes, whichever backend it is of."""

import torch
from torch import Tensor

ACTIVATIONS = (None, "relu", "relu6", "leaky_relu", "silu", "hardswish", "gelu")


def unfit(
    x: Tensor,
    residual: Tensor | None,
    activation: str | None,
    pool: int | None,
    dtypes: tuple[torch.dtype, ...],
) -> str | None:
    """Why a backend that stores ``dtypes`` cannot take the tensors, None if it can."""
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
    if pool is not None and (pool != 2 or x.dim() != 4 or min(x.shape[2:]) < 2):
        return "pooling is 2×2, over the last two of four dimensions"
    if residual is not None:
        if residual.shape != x.shape:
            return "the residual's shape is not the input's"
        if residual.dtype != x.dtype or residual.device != x.device:
            return "the residual's dtype or device is not the input's"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
