"""Layers that serve from weights kept in the order that they are computed in: what they share, and Linear.

torch hands oneDNN a plain weight at each call, and oneDNN puts it in its own order first; for small batches
that is half of the work. These layers keep a reordered copy, and take in what followed them.

``weight`` and ``bias`` stay ordinary parameters: the state dict, ``.to()``, pickling and in-place changes
mean what they mean for torch's layer. The copy is made at the first call that uses it, anew when the weight
has changed, and is never saved. (A change made behind autograd's back, in place on ``weight.data``, cannot be
seen.) A call that is not plain eager execution (a gradient is wanted, something traces or compiles, autocast,
another device or dtype) takes torch's own operators.
"""

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from ..errors import UsageError

# Multiply-adds below which a call of oneDNN through torch costs more (about 20 µs) than it saves. Measured.
WORTH = 1 << 20
# What torch's layers do not have.
_OURS = ("post", "pool", "settings", "served", "_held", "_shape", "_plans")

_ops = torch.ops.mkldnn
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
    wanted = ("_convolution_pointwise", "_linear_pointwise", "_reorder_linear_weight")
    if not torch.backends.mkldnn.is_available() or not all(hasattr(_ops, name) for name in wanted):
        return "this build of torch has no oneDNN"
    return ""


def eager() -> bool:
    """Tell whether this is plain eager execution, that nothing observes, with oneDNN allowed."""
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


def fits(x: Tensor) -> bool:
    """Tell whether it is a float32 tensor on the CPU, and no gradient for it is wanted."""
    return (
        type(x) is Tensor
        and x.dtype is _float32
        and x.is_cpu
        and x.layout is _strided
        and not (x.requires_grad and _is_grad_enabled())
    )


class Held:
    """A weight in other orders, each made when first wanted, and what tells whether it is still the same."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.version, self.address = weight, weight._version, weight.data_ptr()
        self.reordered: Tensor | None = None  # as oneDNN computes
        self.laid_out: Tensor | None = None  # as `kernels.conv.serving` does
        self.neutral: tuple[Tensor, Tensor] | None = None  # mean 0 and 1/σ 1, for the kernel that pools


class Packed(nn.Module):
    """What both layers share: the reordered copy, and what followed the layer."""

    after: nn.Sequential  # as it stood behind the layer; torch's own way through
    post: Post  # the activation in `after`
    _held: Held | None
    _shape: torch.Size  # of the weight

    @classmethod
    def of(cls, layer: Any, after: list[nn.Module], post: Post, pool: bool = False) -> Self:
        """``layer`` as one of these, with the same parameters, followed by the modules ``after``.

        ``post``: the activation among them; ``pool``: the last is the 2x2 mean, which a Linear does not take.
        """
        made = cls.__new__(cls)
        made.__dict__.update(vars(layer))
        made._parameters, made._modules = dict(layer._parameters), {}
        made.after, made.post, made._held = nn.Sequential(*after), post, None
        made._shape = layer.weight.shape
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

    def _hold(self) -> Held | None:
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
            held = self._held = Held(weight) if self._usual(weight) else None
        return held

    def _usual(self, weight: Tensor) -> bool:
        """Tell whether a weight is of the kind and shape that the layer was made with."""
        plain = type(weight) is nn.Parameter and weight.is_cpu and weight.layout is _strided
        return plain and weight.dtype is _float32 and weight.shape == self._shape

    def _packed(self, held: Held) -> Tensor:
        """The weight in oneDNN's order."""
        if held.reordered is None:
            with torch.inference_mode(False), torch.no_grad():
                held.reordered = self._reordered(held.weight.detach())
        return held.reordered

    def _reordered(self, weight: Tensor) -> Tensor:
        """Return the weight in oneDNN's order: each layer has its own."""
        raise NotImplementedError

    @property
    def qconfig(self) -> Any:
        """What ``torch.ao.quantization`` hangs on a layer that it will exchange; none is taken here."""
        return None

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        if value is not None or isinstance(self, nn.Linear):  # ``quantize_dynamic`` gives its Linears None
            raise UsageError(
                f"a {type(self).__name__} serves from float32 weights and cannot be quantised:"
                " fold the model with pack=False, then quantise it"
            )

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._held = None  # .to() may put other values at the same address
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        """All but the copy, which is no plain tensor and is made again."""
        return {**vars(self), "_held": None}

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` takes in its place: torch's layer, and what followed it."""
        kind = nn.Conv2d if isinstance(self, nn.Conv2d) else nn.Linear
        layer: nn.Module = kind.__new__(kind)
        layer.__dict__.update({name: value for name, value in vars(self).items() if name not in _OURS})
        layer._modules = {}
        return nn.Sequential(layer, *self.after)


class PackedLinear(Packed, nn.Linear):
    """``torch.nn.Linear`` and the activation behind it. Input (*, in_features)."""

    def serve(self, input: Tensor) -> Tensor:
        """Multiply, add, activate."""
        if not fits(input):
            return self._plainly(input)
        if input.numel() * self.out_features < WORTH:
            return self._small(input)
        held = self._hold()
        if held is None or input.dim() < 2 or input.shape[-1] != self.in_features:
            return self._plainly(input)
        product: Tensor = _multiply(input, self._packed(held), self._parameters["bias"], *self.post)
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
