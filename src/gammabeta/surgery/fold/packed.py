"""Convolutions and Linears that serve from weights kept in the order oneDNN computes in.

torch hands oneDNN a plain weight at each call, and oneDNN puts it in its own order first; for small batches
that is half of the work. These layers keep the reordered copy, and take in what followed them: the activation
is computed inside oneDNN's convolution, the 2x2 mean by our kernel.

``weight`` and ``bias`` stay ordinary parameters: the state dict, ``.to()``, pickling and in-place changes
mean what they mean for torch's layer. The copy is made at the first call that uses it, anew when the weight
has changed, and is never saved. (A change made behind autograd's back, in place on ``weight.data``, cannot be
seen.) A call that oneDNN shall not take (a gradient is wanted, something traces or
compiles, autocast, another device or dtype) takes torch's own operators.
"""

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from ...functional import _dispatch

# Multiply-adds below which a call of oneDNN through torch costs more (about 20 µs) than it saves. Measured.
WORTH = 1 << 20
_SMALL_IMAGE = 20480  # elements of one image up to which torch convolves without oneDNN, and is quicker
_LARGE_POOL = 8192  # elements from which our kernel pools quicker than torch, its call included
_PART = 4 << 20  # bytes of a convolution's output to pool while they are in the cache
_OURS = ("post", "pool", "settings", "_held", "_plans")  # what torch's layer does not have
_MOST_PLANS = 64  # shapes of input remembered by a layer

_ops = torch.ops.mkldnn
_convolve: Any = _ops._convolution_pointwise.default if hasattr(_ops, "_convolution_pointwise") else None
_multiply: Any = _ops._linear_pointwise.default if hasattr(_ops, "_linear_pointwise") else None

# Under names of their own: a call for one image feels each look-up.
_float32, _strided = torch.float32, torch.strided
_is_compiling, _is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled
_is_autocast_enabled, _onednn_enabled = torch.is_autocast_enabled, torch._C._get_mkldnn_enabled
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_transforms, _tracing = torch._C._are_functorch_transforms_active, torch._C._get_tracing_state


class Post(NamedTuple):
    """An activation as oneDNN's post-operation: its name, its numbers, its algorithm."""

    name: str = "none"
    numbers: tuple[float, ...] = ()
    algorithm: str = ""


def unavailable() -> str:
    """Why nothing can be packed in this build of torch; empty if something can."""
    missing = _convolve is None or _multiply is None or not hasattr(_ops, "_reorder_linear_weight")
    if not torch.backends.mkldnn.is_available() or missing:
        return "this build of torch has no oneDNN"
    return ""


def eager() -> bool:
    """Tell whether this is plain eager execution, seen by nobody, with oneDNN allowed."""
    return not (
        _is_compiling()
        or _dispatch_modes()
        or _function_modes()
        or _transforms()
        or forward_ad._current_level >= 0
        or _tracing() is not None
        or _is_autocast_enabled("cpu")
        or not _onednn_enabled()
    )


def _fits(x: Tensor) -> bool:
    """Tell whether it is a float32 tensor on the CPU, and no gradient for it is wanted."""
    return (
        type(x) is Tensor
        and x.dtype is _float32
        and x.is_cpu
        and x.layout is _strided
        and not (x.requires_grad and _is_grad_enabled())
    )


class _Held(NamedTuple):
    """The weight in oneDNN's order, and what tells whether the weight is still the one it was made from."""

    packed: Tensor
    weight: Tensor
    version: int
    address: int
    zero: Tensor  # with `one`, the map that changes nothing: the kernel that pools also normalises
    one: Tensor


class _Packed(nn.Module):
    """What both layers share: the reordered copy, and what followed the layer."""

    after: nn.Sequential  # as it stood behind the layer; torch's own way through
    post: Post  # the activation in `after`
    _held: _Held | None

    @classmethod
    def of(cls, layer: Any, after: list[nn.Module], post: Post, pool: bool = False) -> Self:
        """``layer`` as one of these, with the same parameters, followed by the modules ``after``.

        ``post``: the activation among them; ``pool``: the last is the 2x2 mean, which a Linear does not take.
        """
        made = cls.__new__(cls)
        made.__dict__.update(vars(layer))
        made._parameters, made._modules = dict(layer._parameters), {}
        made.after, made.post, made._held = nn.Sequential(*after), post, None
        return made

    def forward(self, input: Tensor) -> Tensor:
        """Do what the layer did, and what followed it."""
        return self.serve(input) if eager() else self._plainly(input)

    def serve(self, input: Tensor) -> Tensor:
        """``forward`` where execution is known to be ``eager()``."""
        raise NotImplementedError

    def _plainly(self, x: Tensor) -> Tensor:
        """``forward`` by torch's own operators."""
        raise NotImplementedError

    def _hold(self) -> _Held | None:
        """The copy of the weight as it is now; None if there can be none, or a gradient is wanted."""
        parameters, held = self._parameters, self._held
        try:
            weight, bias = parameters["weight"], parameters["bias"]
        except KeyError:  # a parametrization or pruning makes it anew at each call
            return None
        assert weight is not None
        if _is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
            return None
        if weight.is_inference():  # its changes cannot be seen
            return None
        if (
            held is None
            or held.weight is not weight
            or held.version != weight._version
            or held.address != weight.data_ptr()
        ):
            held = self._held = self._renewed(weight)
        return held

    def _renewed(self, weight: Tensor) -> _Held | None:
        if weight.dtype is not _float32 or not weight.is_cpu or weight.layout is not _strided:
            return None
        with torch.inference_mode(False), torch.no_grad():
            zero, one = weight.new_zeros(weight.shape[0]), weight.new_ones(weight.shape[0])
            packed = self._reordered(weight.detach())
        return _Held(packed, weight, weight._version, weight.data_ptr(), zero, one)

    def _reordered(self, weight: Tensor) -> Tensor:
        """Return the weight in oneDNN's order: each layer has its own."""
        raise NotImplementedError

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._held = None  # .to() may put other values at the same address
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        """All but the copy, which is no plain tensor and is made again."""
        return {**vars(self), "_held": None}

    def _scriptable(self, kind: type[nn.Module]) -> nn.Module:
        """Build torch's layer, and what followed it."""
        layer = kind.__new__(kind)
        layer.__dict__.update({name: value for name, value in vars(self).items() if name not in _OURS})
        layer._modules = {}
        return nn.Sequential(layer, *self.after)


class _Plan(NamedTuple):
    """How inputs of one shape are convolved."""

    own: bool = True  # by oneDNN from the reordered weight; else as torch does it
    kernel: bool = False  # pooled by our kernel
    crop: tuple[int, int] | None = None  # rows and columns of the input that are read at all
    images: int = 0  # at a time; 0: all
    plain: bool = False  # torch's affair altogether: no batch, empty, or wrong


class PackedConv2d(_Packed, nn.Conv2d):
    """``torch.nn.Conv2d`` and the activation and 2x2 mean behind it.

    Input (N, C, H, W), zero padding. The output of a call that oneDNN took is channels_last.
    """

    pool: bool  # the last of `after` is the mean over 2x2 windows, an odd last row or column dropped
    settings: tuple[Any, ...]  # of oneDNN's convolution
    _plans: dict[torch.Size, _Plan]

    @classmethod
    def of(cls, layer: Any, after: list[nn.Module], post: Post, pool: bool = False) -> Self:
        """``layer`` as one of these, with the same parameters, followed by the modules ``after``."""
        made = super().of(layer, after, post)
        made.pool, made._plans = pool, {}
        made.settings = (layer.padding, layer.stride, layer.dilation, layer.groups, *post)
        return made

    def serve(self, input: Tensor) -> Tensor:
        """Convolve, activate, pool."""
        held = self._hold() if _fits(input) else None
        if held is None:
            return self._plainly(input)
        shape = input.shape
        plan = self._plans.get(shape) or self._plan(shape)
        if plan.plain:
            return self._plainly(input)
        bias = self._parameters["bias"]
        if plan.own:
            if plan.crop:
                input = input[:, :, : plan.crop[0], : plan.crop[1]]
            if input.shape[1] == 1 and input.is_contiguous():
                # One channel is channels_last too; oneDNN is the quicker for being told so.
                size = input.shape
                input = input.as_strided(size, (size[2] * size[3], 1, size[3], 1))
            if plan.images:
                return self._in_parts(input, held, bias, plan.images)
            out: Tensor = _convolve(input, held.packed, bias, *self.settings)
            return self._pooled(out, held, plan.kernel, None) if self.pool else out
        if self.post.name != "relu":
            return self._plainly(input)
        out = torch.conv2d(input, held.weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return self._pooled(out, held, plan.kernel, "relu") if self.pool else torch.relu_(out)

    def _plainly(self, x: Tensor) -> Tensor:
        out: Tensor = self.after(self._conv_forward(x, self.weight, self.bias))
        return out

    def _pooled(self, x: Tensor, held: _Held, kernel: bool, activation: str | None) -> Tensor:
        """Activate, and take the mean over 2x2 windows."""
        module = _dispatch.kernels("cpu") if kernel else ""
        if isinstance(module, str):
            return F.avg_pool2d(x if activation is None else torch.relu_(x), 2)
        # Under statistics that change nothing it only activates and pools, in one pass.
        out: Tensor = module.forward(x, held.zero, held.one, None, None, None, activation, 2)
        return out

    def _in_parts(self, x: Tensor, held: _Held, bias: Tensor | None, images: int) -> Tensor:
        """Convolve and pool a few images at a time, so that what is pooled is still in the cache."""
        module = _dispatch.kernels("cpu")
        if isinstance(module, str):
            return F.avg_pool2d(_convolve(x, held.packed, bias, *self.settings), 2)
        height, width = self._size(x.shape)
        shape = (len(x), self.out_channels, height // 2, width // 2)
        pooled = torch.empty(shape, memory_format=torch.channels_last)
        for part, out in zip(x.split(images), pooled.split(images), strict=True):
            found = _convolve(part, held.packed, bias, *self.settings)
            module.forward(found, held.zero, held.one, None, None, None, None, 2, out=out)
        return pooled

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
        small = shape[0] == 1 and shape.numel() <= _SMALL_IMAGE and self.groups == 1
        if small and max(self.kernel_size) <= 3 and height * width * weight < WORTH:
            return _Plan(own=False, kernel=elements >= _LARGE_POOL and min(height, width) > 1)
        if not self.pool or min(height, width) < 2:
            return _Plan()
        rows, columns = height // 2 * 2, width // 2 * 2
        crop = None
        if self.padding == (0, 0) and shape[0] * (height * width - rows * columns) * weight >= WORTH:
            (kh, kw), (sh, sw), (dh, dw) = self.kernel_size, self.stride, self.dilation
            crop = (rows - 1) * sh + dh * (kh - 1) + 1, (columns - 1) * sw + dw * (kw - 1) + 1
        parts = min(-(-4 * elements // _PART), shape[0])
        return _Plan(True, elements >= _LARGE_POOL, crop, -(-shape[0] // parts) if parts > 1 else 0)

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
        return {**super().__getstate__(), "_plans": {}}

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` takes in its place."""
        return self._scriptable(nn.Conv2d)


class PackedLinear(_Packed, nn.Linear):
    """``torch.nn.Linear`` and the activation behind it. Input (*, in_features)."""

    def serve(self, input: Tensor) -> Tensor:
        """Multiply, add, activate."""
        if not _fits(input):
            return self._plainly(input)
        if input.numel() * self.out_features < WORTH:
            return self._small(input)
        held = self._hold()
        if held is None or input.dim() < 2 or input.shape[-1] != self.in_features:
            return self._plainly(input)
        product: Tensor = _multiply(input, held.packed, self._parameters["bias"], *self.post)
        return product

    def _small(self, x: Tensor) -> Tensor:
        """``_plainly`` past ``Module.__getattr__``, where a call of oneDNN costs more than it saves."""
        try:
            weight, bias = self._parameters["weight"], self._parameters["bias"]
        except KeyError:
            return self._plainly(x)
        out = F.linear(x, weight, bias)  # type: ignore[arg-type]
        return torch.relu_(out) if self.post.name == "relu" else self.after(out)

    def _plainly(self, x: Tensor) -> Tensor:
        out: Tensor = self.after(F.linear(x, self.weight, self.bias))
        return out

    def _reordered(self, weight: Tensor) -> Tensor:
        reordered: Tensor = _ops._reorder_linear_weight(weight)
        return reordered

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` takes in its place."""
        return self._scriptable(nn.Linear)
