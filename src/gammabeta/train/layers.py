"""Convolutions and linear layers with a quicker backward pass on the CPU, for the length of a training.

oneDNN takes the gradient at a convolution's input as another convolution, of the output's gradient with
zeros around it: at a 5x5 kernel without padding half of what it multiplies are zeros, and 20 input channels
fill two thirds of its vectors. Here the gradients of all patches are one product,
``(N·OH·OW, O) @ (O, KH·KW·C)``, with nothing wasted, and the patches are then added up into the images: the
same sum in another order.

Both layers cast for autocast themselves, in one node of the autograd graph instead of one for each tensor.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..functional._dispatch import kernels, traced

_DTYPES = (torch.float32, torch.bfloat16)
_WASTE = 2.0  # multiplications of the library by those needed, from which on it is the slower; measured
_LANES = 16  # float32 values in a vector
_PATCH_BYTES = 11 << 18  # of patches at a time, so that they come back from the cache

_aten = torch.ops.aten
_linear: Any = (
    None  # oneDNN's product; torch's own in float32 is MKL's, which is slow on processors not Intel's
)
if torch.backends.mkldnn.is_available():
    _linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``a @ b.T + bias``, by oneDNN where torch offers it: ``(M, K)``, ``(N, K)``, ``(N,)``."""
    if _linear is None:
        return F.linear(a, b, bias)
    found: Tensor = _linear(a, b, bias, "none", [], "")
    return found


# --- convolution ------------------------------------------------------------------------------------------


@lru_cache(1024)
def wasteful(images: torch.Size, weight: torch.Size, padding: tuple[int, int]) -> bool:
    """Tell whether the library multiplies at least twice what it must for the gradient at such an input.

    Args:
        images: ``(N, C, H, W)`` of the input.
        weight: ``(O, C, KH, KW)``; stride and dilation are 1.
        padding: ``(PH, PW)``.
    """
    channels, height, width = images[1:]
    out_height = height + 2 * padding[0] - weight[2] + 1
    out_width = width + 2 * padding[1] - weight[3] + 1
    if min(images[0], out_height, out_width) < 1 or channels % _LANES == 0:
        return False
    lanes = -(-channels // _LANES) * _LANES
    return height * width * lanes >= _WASTE * out_height * out_width * channels


def input_gradient(grad: Tensor, weight: Tensor, images: torch.Size, padding: tuple[int, int]) -> Tensor:
    """Return the gradient at a convolution's input, ``(N, C, H, W)`` in channels_last; stride and dilation 1.

    Args:
        grad: ``(N, O, OH, OW)``, the gradient at its output, float32 or bfloat16.
        weight: ``(O, C, KH, KW)``, of the same dtype.
        images: The shape of the input.
        padding: ``(PH, PW)``.
    """
    from ..kernels.patches import add_patches

    found = torch.empty(images, dtype=grad.dtype, memory_format=torch.channels_last)
    rows = grad.permute(0, 2, 3, 1).reshape(-1, grad.shape[1])
    matrix = weight.permute(0, 2, 3, 1).reshape(len(weight), -1).t()
    count, rows_each = images[0], len(rows) // images[0]
    groups = -(-len(rows) * len(matrix) * grad.element_size() // _PATCH_BYTES)
    each = -(-count // groups)
    for start in range(0, count, each):
        patches = product(rows[start * rows_each : (start + each) * rows_each], matrix)
        add_patches(patches, found[start : start + each], (weight.shape[2], weight.shape[3]), padding)
    return found


class _Convolve(torch.autograd.Function):
    """``conv2d`` at stride and dilation 1, computed in ``dtype``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        x, weight = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(x, weight)
        ctx.padding, ctx.bias_sizes = padding, None if bias is None else [len(weight)]
        return F.conv2d(x, weight, None if bias is None else bias.to(dtype), 1, padding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        need = list(ctx.needs_input_grad[:3])
        quick = need[0] and not torch.is_grad_enabled()  # else the second derivative is asked for
        found = input_gradient(grad, weight, x.shape, ctx.padding) if quick else None
        rest = [need[0] and not quick, *need[1:]]
        others = _aten.convolution_backward(
            grad, x, weight, ctx.bias_sizes, [1, 1], ctx.padding, [1, 1], False, [0, 0], 1, rest
        )
        return (found if quick else others[0], *others[1:], None, None)


class Convolution(nn.Conv2d):
    """``torch.nn.Conv2d`` of stride and dilation 1, the same in everything but time."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``(N, C, H, W)``."""
        padding: Any = self.padding
        dtype = _computed_in(x, self.weight) if x.requires_grad and x.dim() == 4 else None
        if dtype is None or not wasteful(x.shape, self.weight.shape, padding) or not _has_kernels():
            return super().forward(x)
        found: Tensor = _apply(_Convolve, x, self.weight, self.bias, padding, dtype)
        return found


# --- linear -----------------------------------------------------------------------------------------------


class _Multiply(torch.autograd.Function):
    """``linear`` of a matrix, computed in ``dtype``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        x, weight = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(x, weight)
        return product(x, weight, None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        need = ctx.needs_input_grad
        multiply = torch.mm if torch.is_grad_enabled() else _product_of
        dx = multiply(grad, weight) if need[0] else None
        dweight = multiply(grad.t(), x) if need[1] else None
        return dx, dweight, grad.sum(0) if need[2] else None, None


def _product_of(a: Tensor, b: Tensor) -> Tensor:
    return product(a, b.t())


class Linear(nn.Linear):
    """``torch.nn.Linear``, the same in everything but time."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in)`` to ``(N, out)``; any other shape as ``torch.nn.Linear`` does."""
        dtype = _computed_in(x, self.weight) if x.dim() == 2 and x.numel() else None
        if dtype is None:
            return super().forward(x)
        found: Tensor = _apply(_Multiply, x, self.weight, self.bias, dtype)
        return found


# --- in a model -------------------------------------------------------------------------------------------


def _computed_in(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """The dtype that a layer computes in; None where these classes leave the call to torch."""
    if x.device.type != "cpu" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    if dtype not in _DTYPES or (not autocast and weight.dtype is not dtype) or traced(x) is not None:
        return None
    return dtype


def _has_kernels() -> bool:
    return not isinstance(kernels("cpu"), str)


def _apply(function: Any, *args: Any) -> Any:
    return function.apply(*args)


@contextmanager
def quick_layers(model: nn.Module) -> Iterator[None]:
    """Let the layers of a model that those here can stand for be of these classes for a while."""
    changed = [(module, type(module)) for module in model.modules() if _replaceable(module)]
    for module, kind in changed:
        module.__class__ = Convolution if kind is nn.Conv2d else Linear
    try:
        yield
    finally:
        for module, kind in changed:
            module.__class__ = kind


def _replaceable(module: nn.Module) -> bool:
    """Whether it is a plain layer: no subclass, nothing put over its methods, a convolution of stride 1."""
    if {"forward", "_conv_forward"} & vars(module).keys():
        return False
    if type(module) is nn.Linear:
        return True
    return (
        type(module) is nn.Conv2d
        and module.stride == module.dilation == (1, 1)
        and module.groups == 1
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )
