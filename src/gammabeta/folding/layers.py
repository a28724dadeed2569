"""What replaces a batch norm in the folded model: nothing, its tail, or one multiply-add."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..epilogue import Epilogue, Pool
from ..nn.layer import Fused
from .affine import Affine


class ChannelAffine(nn.Module):
    """``y = scale * x + shift`` on dimension 1, in one pass.

    Input (N, C, *); output the same shape and dtype. The pass is torch's own batch-norm kernel with mean 0,
    variance 1 and eps 0: it is faster than a broadcast multiply and add on large contiguous inputs, keeps
    mixed dtypes, and exports to ONNX as one node.
    """

    scale: Tensor
    shift: Tensor
    zero: Tensor
    one: Tensor

    def __init__(self, affine: Affine, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("scale", affine.scale.to(device, dtype))
        self.register_buffer("shift", affine.shift.to(device, dtype))
        self.register_buffer("zero", torch.zeros_like(self.scale), persistent=False)
        self.register_buffer("one", torch.ones_like(self.scale), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply and add; ``x`` is (N, C, *)."""
        return F.batch_norm(x, self.zero, self.one, self.scale, self.shift, False, 0.0, 0.0)

    def extra_repr(self) -> str:
        """Show the number of channels."""
        return str(self.scale.numel())


class Tail(nn.Module):
    """What a fused batch norm does after its map: ``pool(activation(x + residual))``."""

    def __init__(self, activation: str | None, pool: Pool) -> None:
        super().__init__()
        self.activation, self.pool = activation, pool

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        activation: str | None = None,
        pool: Pool = None,
    ) -> Tensor:
        """Add, activate, pool: ``x`` and ``residual`` are (N, C, *). A call may ask for more.

        ReLU writes over ``x``: where a fold puts this module, nothing else reads the convolution's output.
        """
        activation = self.activation or activation
        if residual is None and activation == "relu":
            x, activation = F.relu_(x), None
        return Epilogue(activation, self.pool or pool).apply(x, residual)

    def extra_repr(self) -> str:
        """Show what it does."""
        return f"activation={self.activation!r}, pool={self.pool!r}"


class AffineTail(nn.Module):
    """A multiply-add and a tail, for a fused batch norm that the maps before it were merged into."""

    def __init__(self, affine: ChannelAffine, tail: Tail) -> None:
        super().__init__()
        self.affine, self.tail = affine, tail

    def forward(self, x: Tensor, residual: Tensor | None = None, **settings: Any) -> Tensor:
        """Map, then add, activate, pool."""
        out: Tensor = self.tail(self.affine(x), residual, **settings)
        return out


def plain(model: nn.Module) -> nn.Module:
    """Return ``model`` with each fused batch norm that stayed made of torch's own operations.

    An exporter then meets nothing but those. Changes ``model``.
    """
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, Fused) and child.running_mean is not None and child.running_var is not None:
                affine = Affine.of(child.running_mean, child.running_var, child.weight, child.bias, child.eps)
                held = ChannelAffine(affine, child.running_mean.dtype, child.running_mean.device)
                parent._modules[name] = AffineTail(held, Tail(child.activation, child.pool)).eval()
    return model
