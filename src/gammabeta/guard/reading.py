"""What the buffers of a model's batch norms say at one moment, and what two moments say of the batch between.

An update is ``new = (1 - w) * old + w * batch``. So two readings one step apart give the batch's own mean and
variance, without a look at any activation: ``batch = old + (new - old) / w``. Where a layer was updated ``r``
times in the step, ``w = 1 - (1 - momentum) ** r`` gives a weighted mean over the ``r`` batches.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..graph.layers import BatchNormLayer, batch_norm_layers, is_frozen_class

ROUNDING = 8 * 2.0**-24  # of float32, a few operations


@dataclass(frozen=True)
class Reading:
    """One moment; ``counts`` and ``training`` are of each layer, ``mean`` and ``var`` (C,) float64 each."""

    step: int
    counts: tuple[int, ...]
    training: tuple[bool, ...]
    mean: tuple[Tensor, ...]
    var: tuple[Tensor, ...]


@dataclass(frozen=True)
class BatchSeen:
    """A layer's batch between two readings, (C,) float64; ``floor``: what rounding may do to a variance."""

    mean: Tensor
    var: Tensor  # unbiased
    floor: Tensor


def kept_norms(model: nn.Module) -> dict[str, BatchNormLayer]:
    """The batch norms that keep statistics and count their updates, by name."""
    return {
        name: layer
        for name, layer in batch_norm_layers(model).items()
        if layer.running_mean is not None
        and layer.num_batches_tracked is not None
        and not isinstance(layer.running_mean, nn.UninitializedBuffer)
        and not is_frozen_class(layer)
    }


def read(layers: list[BatchNormLayer], step: int) -> Reading:
    """Copy what the buffers hold: one copy for all means, one for all variances."""
    sizes = [layer.num_features for layer in layers]
    return Reading(
        step,
        tuple(int(layer.num_batches_tracked) for layer in layers if layer.num_batches_tracked is not None),
        tuple(layer.training for layer in layers),
        _together([layer.running_mean for layer in layers], sizes),
        _together([layer.running_var for layer in layers], sizes),
    )


def _together(tensors: list[Tensor | None], sizes: list[int]) -> tuple[Tensor, ...]:
    flat = [t.detach().reshape(-1) for t in tensors if t is not None]
    if len({t.device for t in flat}) > 1:
        flat = [t.cpu() for t in flat]
    parts: tuple[Tensor, ...] = torch.cat(flat).to("cpu", torch.float64, copy=True).split(sizes)
    return parts


def batch_between(layer: BatchNormLayer, old: Reading, new: Reading, index: int) -> BatchSeen | None:
    """The layer's batch between two readings; None where there was no update, or the weight is not known."""
    updates = new.counts[index] - old.counts[index]
    if updates < 1 or old.counts[index] < 1:
        return None
    momentum = layer.momentum
    weight = updates / new.counts[index] if momentum is None else 1 - (1 - momentum) ** updates
    if not 1e-3 <= weight <= 1:
        return None
    before, after = old.var[index], new.var[index]
    return BatchSeen(
        old.mean[index] + (new.mean[index] - old.mean[index]) / weight,
        before + (after - before) / weight,
        ROUNDING * torch.maximum(before, after) / weight,
    )
