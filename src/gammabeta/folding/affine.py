"""The algebra of folding: a per-channel affine map, and how it enters the weights of a linear operation.

In evaluation mode batch normalization is ``y = scale * x + shift`` for each channel, with
``scale = γ / sqrt(σ² + eps)`` and ``shift = β - μ * scale`` (Ioffe & Szegedy 2015, Algorithm 2, line 11; σ²
is the running variance as stored, which PyTorch keeps unbiased). A convolution or Linear is linear in its
input and in its weight, so the map can enter its weight and bias, from behind (``fold_after``) or from
before (``fold_before``).

Everything here is computed in float64 and rounded once, where the result is stored.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class NotExactError(Exception):
    """The fold would change the result; the message says why."""


@dataclass(frozen=True)
class Affine:
    """``y = scale * x + shift`` on each of C channels. Shapes (C,), float64."""

    scale: Tensor
    shift: Tensor

    @staticmethod
    def of(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> "Affine":
        """Build the map of an evaluation-mode batch norm. Shapes (C,), any float dtype."""
        mean, var = mean.detach().double(), var.detach().double()
        scale = torch.rsqrt(var + eps)
        if weight is not None:
            scale = scale * weight.detach().double()
        shift = -mean * scale
        if bias is not None:
            shift = shift + bias.detach().double()
        return Affine(scale, shift)

    @property
    def channels(self) -> int:
        """C."""
        return self.scale.numel()

    @property
    def finite(self) -> bool:
        """Whether every number is finite: a damaged running variance gives NaN or infinity."""
        return bool(torch.isfinite(self.scale).all() and torch.isfinite(self.shift).all())

    def then(self, later: "Affine") -> "Affine":
        """Compose: this map first, ``later`` second."""
        return Affine(self.scale * later.scale, self.shift * later.scale + later.shift)

    def repeated(self, times: int) -> "Affine":
        """Give each channel ``times`` neighbouring features, as flattening (N, C, H, W) does."""
        return Affine(self.scale.repeat_interleave(times), self.shift.repeat_interleave(times))


@dataclass(frozen=True)
class Operation:
    """One convolution, transposed convolution or Linear, without its weights.

    ``spatial`` is the number of spatial dimensions (0 for Linear); ``settings`` are the keyword arguments of
    the torch function beside input, weight and bias.
    """

    kind: str
    spatial: int
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def groups(self) -> int:
        """The number of groups; 1 for Linear."""
        return int(self.settings.get("groups", 1))

    def axis(self, shape: tuple[int, ...]) -> int:
        """The dimension that holds the channels in an input or output of this shape."""
        return len(shape) - 1 - self.spatial

    @property
    def weight_axes(self) -> tuple[int, int]:
        """The dimensions of a weight that stand for the input's and for the output's channels."""
        return (0, 1) if self.kind == "conv_transpose" else (1, 0)

    def channels(self, weight: Tensor, axis: int) -> int:
        """Channels that dimension ``axis`` of a weight stands for: dimension 1 holds those of one group."""
        return weight.shape[axis] * (self.groups if axis == 1 else 1)

    def scaled(self, weight: Tensor, scale: Tensor, axis: int) -> Tensor:
        """``weight`` with a factor for each of the channels that its dimension ``axis`` stands for."""
        if axis == 0:
            return weight * scale.reshape(-1, *([1] * (weight.dim() - 1)))
        per_group = weight.reshape(self.groups, -1, *weight.shape[1:])  # (G, rows of a group, channels, *k)
        return (per_group * scale.reshape(self.groups, 1, -1, *([1] * self.spatial))).reshape(weight.shape)

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Call torch's own function."""
        if self.kind == "linear":
            return F.linear(x, weight, bias)
        function = getattr(F, f"{self.kind}{self.spatial}d")
        result: Tensor = function(x, weight, bias, **self.settings)
        return result


def fold_after(op: Operation, weight: Tensor, bias: Tensor | None, affine: Affine) -> tuple[Tensor, Tensor]:
    """Weight and bias of ``affine ∘ op``, in float64; exact for every linear operation.

    Weight shapes: Linear (O, I), conv (O, I/G, *k), transposed conv (I, O/G, *k) whose output channel
    ``g*(O/G)+j`` stands at ``[rows of group g, j]``.
    """
    _, axis = op.weight_axes
    channels = op.channels(weight, axis)
    if affine.channels != channels:
        raise NotExactError(
            f"it has {affine.channels} channels, and the {op.kind} before it gives {channels}"
        )
    b = torch.zeros_like(affine.shift) if bias is None else bias.detach().double()
    return op.scaled(weight.detach().double(), affine.scale, axis), b * affine.scale + affine.shift


def fold_before(
    op: Operation, weight: Tensor, bias: Tensor | None, affine: Affine
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of ``op ∘ affine``, in float64; raises ``NotExactError`` where there are none.

    The scale always enters the weight. The shift becomes a constant image, and enters the bias only if the
    operation's answer to that image is the same at every position: zero padding, or a transposed
    convolution's borders, make it differ. The answer is computed, on an image large enough to hold every
    border and an inside.
    """
    axis, _ = op.weight_axes
    channels = op.channels(weight, axis)
    if affine.channels != channels:
        raise NotExactError(f"it has {affine.channels} channels, and the {op.kind} after it takes {channels}")
    w = weight.detach().double()
    b = None if bias is None else bias.detach().double()
    if affine.shift.any():
        answer = _answer(op, w, affine.shift)
        b = answer if b is None else answer + b
    return op.scaled(w, affine.scale, axis), b


def _answer(op: Operation, weight: Tensor, shift: Tensor) -> Tensor:
    """The answer of ``op`` to the constant image ``shift``, (O,), if it is the same at every position."""
    if op.kind == "linear":
        return F.linear(shift, weight)
    size = [_probe_size(op, weight.shape[2 + i], i) for i in range(op.spatial)]
    image = shift.reshape(1, -1, *([1] * op.spatial)).expand(1, -1, *size)
    response = op.run(image, weight).flatten(2)[0]  # (O, positions)
    scale = weight.abs().sum() * shift.abs().max()
    if bool(((response - response[:, :1]).abs() > 1e-13 * scale).any()):
        cause = (
            "zero padding" if op.kind == "conv" else "the borders and stride of the transposed convolution"
        )
        raise NotExactError(f"{cause} after its shift: the shift would reach each position differently")
    return response[:, 0]


def _probe_size(op: Operation, kernel: int, dim: int) -> int:
    def setting(name: str) -> int:
        value = op.settings.get(name, 1)
        return int(value if isinstance(value, int) else value[dim % len(value)])

    return 2 * (setting("dilation") * (kernel - 1) + 1) + 2 * setting("stride") + 1
