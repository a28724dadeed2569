"""A convolution that serves from a reordered weight, with the activation and 2x2 mean behind it.

By our own kernel where there is one and it is the quicker (``_is_ours``): all is one pass, and a call costs a
quarter of oneDNN's. Else by oneDNN, which computes the activation, and our kernel for the mean; the smallest
by torch's own convolution.
"""

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..epilogue import ACTIVATIONS, Epilogue
from ..kernels import backend
from ..kernels.backend import Call, Normalized
from ..kernels.conv import serving
from .packed import WORTH, Held, Packed, Post, fits

_SMALL_IMAGE = 20480  # elements of one image up to which torch convolves without oneDNN, and is quicker
_LARGE_POOL = 8192  # elements from which our kernel pools quicker than torch, its call included
_SERVED = 1 << 24  # multiply-adds up to which our convolution is the quicker even if nothing is pooled
_PART = 4 << 20  # bytes of a convolution's output to pool while they are in the cache
_MOST_PLANS = 64  # shapes of input remembered by a layer

_ops = torch.ops.mkldnn
_convolve: Any = _ops._convolution_pointwise.default if hasattr(_ops, "_convolution_pointwise") else None

# The activations of our kernels, by oneDNN's names and numbers for them.
_ACTIVATIONS: dict[tuple[Any, ...], str | None] = {
    Post(): None,
    **{row.onednn: name for name, row in ACTIVATIONS.items() if row.onednn},
}


def _readable(x: Tensor, bias: Tensor | None, channels: int) -> bool:
    """Tell whether our kernel may read the memory of an input that fits, and of a bias."""
    if x.is_neg():
        return False
    return bias is None or (
        bias.dtype is torch.float32 and bias.is_cpu and bias.shape == (channels,) and bias.is_contiguous()
    )


class _Plan(NamedTuple):
    """How inputs of one shape are convolved."""

    own: bool = True  # by oneDNN from the reordered weight; else as torch does it
    kernel: bool = False  # pooled by our kernel
    crop: tuple[int, int] | None = None  # rows and columns of the input that are read at all
    images: int = 0  # at a time; 0: all
    plain: bool = False  # torch's affair altogether: no batch, empty, or wrong
    ours: bool = False  # all of it by our kernel


class PackedConv2d(Packed, nn.Conv2d):
    """``torch.nn.Conv2d`` and the activation and 2x2 mean behind it.

    Input (N, C, H, W), zero padding. The output of a call that oneDNN took is channels_last.
    """

    pool: bool  # the last of `after` is the mean over 2x2 windows, an odd last row or column dropped
    settings: tuple[Any, ...]  # of oneDNN's convolution
    served: serving.Layer  # the same of ours
    _plans: dict[torch.Size, _Plan]

    @classmethod
    def of(cls, layer: Any, after: list[nn.Module], post: Post, pool: bool = False) -> Self:
        """``layer`` as one of these, with the same parameters, followed by the modules ``after``."""
        made = super().of(layer, after, post)
        made.pool, made._plans = pool, {}
        made.settings = (layer.padding, layer.stride, layer.dilation, layer.groups, *post)
        window = (layer.padding, layer.stride, layer.dilation)
        made.served = serving.Layer(tuple(layer.weight.shape), *window, _ACTIVATIONS.get(post), pool)
        return made

    def serve(self, input: Tensor) -> Tensor:
        """Convolve, activate, pool."""
        held = self._hold() if fits(input) else None
        if held is None:
            return self._plainly(input)
        shape = input.shape
        plan = self._plans.get(shape) or self._plan(shape)
        bias = self._parameters["bias"]
        if plan.ours and _readable(input, bias, self.out_channels):
            return self._ours(input, held, bias)
        if plan.plain:
            return self._plainly(input)
        if plan.own:
            if plan.crop:
                input = input[:, :, : plan.crop[0], : plan.crop[1]]
            if input.shape[1] == 1 and input.is_contiguous():
                # One channel is channels_last too; oneDNN is the quicker for being told so.
                size = input.shape
                input = input.as_strided(size, (size[2] * size[3], 1, size[3], 1))
            if plan.images:
                return self._in_parts(input, held, bias, plan.images)
            out: Tensor = _convolve(input, self._packed(held), bias, *self.settings)
            return self._pooled(out, held, plan.kernel, None) if self.pool else out
        if self.post.name != "relu":
            return self._plainly(input)
        out = torch.conv2d(input, held.weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return self._pooled(out, held, plan.kernel, "relu") if self.pool else torch.relu_(out)

    def _ours(self, x: Tensor, held: Held, bias: Tensor | None) -> Tensor:
        """Everything by our kernel."""
        if held.laid_out is None:
            with torch.inference_mode(False), torch.no_grad():
                held.laid_out = serving.lay_out(held.weight.detach())
        if self.padding != (0, 0):
            x = x.contiguous(memory_format=torch.channels_last)
        plan = serving.plan_of(x.shape, x.stride(), self.served, torch.get_num_threads())
        return serving.convolve(x, held.laid_out, bias, plan)

    def _plainly(self, x: Tensor) -> Tensor:
        out: Tensor = self.after(self._conv_forward(x, self.weight, self.bias))
        return out

    def _pooled(self, x: Tensor, held: Held, kernel: bool, activation: str | None) -> Tensor:
        """Activate, and take the mean over 2x2 windows."""
        if not kernel:
            return F.avg_pool2d(x if activation is None else torch.relu_(x), 2)
        # Under statistics that change nothing it only activates and pools, in one pass.
        call = Call(x, None, None, None, Epilogue(activation, 2), 0.0)
        out: Tensor = backend.load("cpu").forward(Normalized(call, *self._neutral(held)))
        return out

    def _in_parts(self, x: Tensor, held: Held, bias: Tensor | None, images: int) -> Tensor:
        """Convolve and pool a few images at a time, so that what is pooled is still in the cache."""
        kernels, packed, neutral = backend.load("cpu"), self._packed(held), self._neutral(held)
        height, width = self._size(x.shape)
        shape = (len(x), self.out_channels, height // 2, width // 2)
        pooled = torch.empty(shape, dtype=x.dtype, device="cpu", memory_format=torch.channels_last)
        for part, out in zip(x.split(images), pooled.split(images), strict=True):
            found = _convolve(part, packed, bias, *self.settings)
            call = Call(found, None, None, None, Epilogue(pool=2), 0.0)
            kernels.forward(Normalized(call, *neutral), out=out)
        return pooled

    def _neutral(self, held: Held) -> tuple[Tensor, Tensor]:
        if held.neutral is None:
            with torch.inference_mode(False):
                zeros = torch.zeros(self.out_channels, dtype=torch.float32, device="cpu")
                held.neutral = zeros, torch.ones_like(zeros)
        return held.neutral

    def _plan(self, shape: torch.Size) -> _Plan:
        """Find the plan for inputs of this shape, and keep it."""
        if len(self._plans) >= _MOST_PLANS:
            self._plans.clear()
        plan = self._plans[shape] = self._plan_of(shape)
        return plan

    def _plan_of(self, shape: torch.Size) -> _Plan:
        if len(shape) != 4 or shape[1] != self.in_channels or not all(shape):
            return _Plan(plain=True)
        height, width = self._size(shape)
        elements, weight = shape[0] * self.out_channels * height * width, self.weight.numel()
        kernels = not isinstance(backend.load("cpu"), str)
        if kernels and self._is_ours(shape[0] * height * width * weight, height, width):
            return _Plan(ours=True)
        large = kernels and elements >= _LARGE_POOL
        small = shape[0] == 1 and shape.numel() <= _SMALL_IMAGE and self.groups == 1
        if small and max(self.kernel_size) <= 3 and height * width * weight < WORTH:
            return _Plan(own=False, kernel=large and min(height, width) > 1)
        if not self.pool or min(height, width) < 2:
            return _Plan()
        rows, columns = height // 2 * 2, width // 2 * 2
        crop = None
        if self.padding == (0, 0) and shape[0] * (height * width - rows * columns) * weight >= WORTH:
            (kh, kw), (sh, sw), (dh, dw) = self.kernel_size, self.stride, self.dilation
            crop = (rows - 1) * sh + dh * (kh - 1) + 1, (columns - 1) * sw + dw * (kw - 1) + 1
        parts = min(-(-4 * elements // _PART), shape[0]) if large else 1
        return _Plan(True, large, crop, -(-shape[0] // parts) if parts > 1 else 0)

    def _is_ours(self, products: int, height: int, width: int) -> bool:
        """Tell whether our kernel can convolve, and quicker; ``height`` and ``width`` before pooling."""
        if self.groups != 1 or min(height, width) < (2 if self.pool else 1):
            return False
        if self.post not in _ACTIVATIONS or not (self.pool or products <= _SERVED):
            return False
        return serving.unsupported(self.served.activation) is None

    def _size(self, shape: torch.Size) -> tuple[int, int]:
        """Height and width of what the convolution gives."""
        (kh, kw), (sh, sw), (dh, dw) = self.kernel_size, self.stride, self.dilation
        ph, pw = int(self.padding[0]), int(self.padding[1])
        height, width = shape[2:]
        return (height + 2 * ph - dh * (kh - 1) - 1) // sh + 1, (width + 2 * pw - dw * (kw - 1) - 1) // sw + 1

    def _reordered(self, weight: Tensor) -> Tensor:
        reordered: Tensor = _ops._reorder_convolution_weight(
            weight, self.padding, self.stride, self.dilation, self.groups
        )
        return reordered

    def __getstate__(self) -> dict[str, Any]:
        """All but the copy and the plans, which are made again."""
        return {**super().__getstate__(), "_plans": {}, "served": tuple(self.served)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a copy's or a pickle's state, where ``served`` is a plain tuple."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.served = serving.Layer(*state["served"])
