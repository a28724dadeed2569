"""Convolutions with a quicker backward pass on the CPU, for the length of a training.

oneDNN takes the gradient at a convolution's input as another convolution, of the output's gradient with
zeros around it: at a 5x5 kernel without padding half of what it multiplies are zeros, and 20 input channels
fill two thirds of its vectors. And it takes the weight's gradient, in bfloat16, with as much waste at such
numbers of channels. ``kernels.conv.gradients`` multiplies each value once, in full vectors: the same sums
in another order.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..functional.step import traced
from ..kernels.backend import load as kernels
from ..kernels.conv import gradients

_DTYPES = (torch.float32, torch.bfloat16)
_WASTE = 1.5  # multiplications of the library by those needed, from which on it is the slower; measured
_LANES = 16  # float32 values in a vector
_BLOCK = 64  # output channels that our weight gradient takes at a time
_SPILL = 1.15  # how much more of them than the library's whole vectors may be multiplied; measured
_TABLE = 1 << 20  # bytes of a weight's gradient that stay in a core's cache; measured

_aten = torch.ops.aten


class Case(NamedTuple):
    """A convolution of stride and dilation 1."""

    images: torch.Size  # (N, C, H, W), the input's
    weight: torch.Size  # (O, C, KH, KW)
    padding: tuple[int, int]
    dtype: torch.dtype  # computed in

    def output(self) -> tuple[int, int] | None:
        """Rows and columns of the output; None for a case that is torch's to compute or to refuse."""
        count, channels, *size = self.images
        height, width = (
            side + 2 * zeros - kernel + 1
            for side, zeros, kernel in zip(size, self.padding, self.weight[2:], strict=True)
        )
        if min(count, height, width) < 1 or channels != self.weight[1] or isinstance(kernels("cpu"), str):
            return None
        return height, width


@lru_cache(1024)
def wasteful(case: Case) -> bool:
    """Tell whether the library multiplies much more than it must for an input gradient, and we need not."""
    output = case.output()
    if output is None:
        return False
    _, channels, height, width = case.images
    lanes, out_pixels = -(-channels // _LANES) * _LANES, output[0] * output[1]
    if height * width * lanes < _WASTE * out_pixels * channels:
        return False
    return gradients.unsupported(case.dtype, case.weight[0], out_pixels) is None


@lru_cache(1024)
def quick_weight(case: Case) -> bool:
    """Tell whether our weight gradient is the quicker one."""
    if case.dtype is not torch.bfloat16 or case.output() is None:
        return False
    outs, whole = case.weight[0], -(-case.weight[0] // _LANES) * _LANES
    blocks = whole if outs <= _BLOCK else -(-outs // _BLOCK) * _BLOCK
    if blocks > _SPILL * whole or 4 * case.weight.numel() > _TABLE:
        return False
    return gradients.unsupported_weight() is None


class _Convolve(torch.autograd.Function):
    """``conv2d`` at stride and dilation 1, computed in ``dtype``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        given = (x, weight)
        x, weight = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(*given, x, weight)
        ctx.padding, ctx.bias_sizes = padding, None if bias is None else [len(weight)]
        return F.conv2d(x, weight, None if bias is None else bias.to(dtype), 1, padding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        given_x, given_weight, x, weight = ctx.saved_tensors
        need = list(ctx.needs_input_grad[:3])
        found: list[Any] = [None, None, None]
        if torch.is_grad_enabled():  # a second derivative is asked for: torch's operator has one
            x, weight = given_x.to(x.dtype), given_weight.to(x.dtype)
        else:
            case = Case(x.shape, weight.shape, ctx.padding, x.dtype)
            if need[0] and wasteful(case):
                found[0] = gradients.input_gradient(grad, weight, x.shape, ctx.padding)
            if need[1] and quick_weight(case):
                found[1] = gradients.weight_gradient(grad, x, weight.shape[2:], ctx.padding)
        rest = [wanted and done is None for wanted, done in zip(need, found, strict=True)]
        if any(rest):
            others = _aten.convolution_backward(
                grad, x, weight, ctx.bias_sizes, [1, 1], ctx.padding, [1, 1], False, [0, 0], 1, rest
            )
            found = [other if todo else done for todo, other, done in zip(rest, others, found, strict=True)]
        return (*found, None, None)


class Convolution(nn.Conv2d):
    """``torch.nn.Conv2d`` of stride and dilation 1, the same in everything but time."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``(N, C, H, W)``."""
        padding: Any = self.padding
        dtype = _computed_in(x, self.weight) if x.dim() == 4 else None
        if dtype is not None:
            case = Case(x.shape, self.weight.shape, padding, dtype)
            if (x.requires_grad and wasteful(case)) or (self.weight.requires_grad and quick_weight(case)):
                function: Any = _Convolve.apply
                found: Tensor = function(x, self.weight, self.bias, padding, dtype)
                return found
        return super().forward(x)


def _computed_in(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """The dtype that a layer computes in; None where these classes leave the call to torch."""
    if x.device.type != "cpu" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    if dtype not in _DTYPES or (not autocast and weight.dtype is not dtype) or traced(x) is not None:
        return None
    return dtype


@contextmanager
def quick_layers(model: nn.Module) -> Iterator[None]:
    """Let the convolutions of a model that ``Convolution`` can stand for be of that class for a while."""
    changed = [module for module in model.modules() if replaceable(module)]
    for module in changed:
        module.__class__ = Convolution
    try:
        yield
    finally:
        for module in changed:
            module.__class__ = nn.Conv2d


def replaceable(module: nn.Module) -> bool:
    """Whether it is a plain ``Conv2d``, with nothing put over its methods, of stride and dilation 1."""
    return (
        type(module) is nn.Conv2d
        and not {"forward", "_conv_forward"} & vars(module).keys()
        and module.stride == module.dilation == (1, 1)
        and module.groups == 1
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )
