"""Layers that are wrong by construction, for the fault bench."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def statistics(layer: _BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    """The layer's three buffers, which every subject has."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    assert layer.num_batches_tracked is not None
    return layer.running_mean, layer.running_var, layer.num_batches_tracked


class Checkpointed(nn.Module):
    """A module under activation checkpointing."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        """The module's own output."""
        return checkpoint(self.inner, x, use_reentrant=False)


class NotebookBatchNorm(nn.Module):
    """The notebook's layer: batch statistics in training, running ones in evaluation, updated in both."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, like: _BatchNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = like.weight, like.bias, like.eps
        mean, var, _ = statistics(like)
        self.register_buffer("running_mean", mean.clone())
        self.register_buffer("running_var", var.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Normalise, and update whatever the mode."""
        dims = [0, *range(2, x.dim())]
        view = (1, -1, *[1] * (x.dim() - 2))
        var, mean = torch.var_mean(x, dims, correction=0)
        used = (mean, var) if self.training else (self.running_mean, self.running_var)
        out = (x - used[0].view(view)) / (used[1].view(view) + self.eps).sqrt()
        with torch.no_grad():
            self.running_mean.mul_(0.9).add_(0.1 * mean)
            self.running_var.mul_(0.9).add_(0.1 * var)
        return out * self.weight.view(view) + self.bias.view(view)


class AlwaysUpdating(nn.BatchNorm2d):
    """The same fault in a subclass of PyTorch's layer."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise by the running statistics in evaluation, but update them first."""
        with torch.no_grad():
            var, mean = torch.var_mean(x, (0, 2, 3))
            running_mean, running_var, _ = statistics(self)
            running_mean.lerp_(mean, 0.1)
            running_var.lerp_(var, 0.1)
        return super().forward(x)
