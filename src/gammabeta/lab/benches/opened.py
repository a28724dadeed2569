"""A network walked through layer by layer, so that what lies inside a fused batch norm can be seen.

A layer of ours normalises, activates and pools in one pass and keeps nothing in between. Here the same is
done in steps, by ``reference.py``.
"""

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ... import reference
from ...elementary import ACTIVATIONS, mean_pool_2x2


@dataclass(frozen=True)
class Site:
    """One batch norm and what it did to a batch; tensors ``(N, C, *spatial)``.

    Attributes:
        name: of the layer in the model.
        before: what enters the batch norm.
        after: what leaves it and enters the activation.
        activated: what leaves the activation.
        output: what the next layer gets: ``activated``, pooled where the layer pools.
    """

    name: str
    before: Tensor
    after: Tensor
    activated: Tensor
    output: Tensor


def norms(model: nn.Sequential) -> list[tuple[str, _BatchNorm]]:
    """The batch norms among a model's layers, by name, in order."""
    return [(name, layer) for name, layer in model.named_children() if isinstance(layer, _BatchNorm)]


def walk(model: nn.Sequential, x: Tensor, *, by_batch: bool = False) -> tuple[list[Site], Tensor]:
    """Run ``x`` through a model; return what happened at each batch norm, and the logits.

    Args:
        model: a ``Sequential`` whose batch norms are this package's.
        x: ``(N, C, H, W)``.
        by_batch: normalise with the batch's statistics, as in training; running statistics stay as they are.
    """
    sites = []
    for name, layer in model.named_children():
        if isinstance(layer, _BatchNorm):
            sites.append(site(name, layer, x, by_batch=by_batch))
            x = sites[-1].output
        else:
            x = layer(x)
    return sites, x


def site(name: str, layer: Any, x: Tensor, *, by_batch: bool) -> Site:
    """What one batch norm makes of ``x``, step by step."""
    if by_batch:
        batch = reference.batch_statistics(x)
        mean, var = batch.mean, batch.var
    else:
        mean, var = layer.running_mean, layer.running_var
    after = reference.scale_and_shift(reference.normalize(x, mean, var, layer.eps), layer.weight, layer.bias)
    return Site(name, x, after, *follow(layer, after))


def follow(layer: Any, after: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer's activation and pool make of its normalised values."""
    activated = after if layer.activation is None else ACTIVATIONS[layer.activation](after)
    return activated, activated if layer.pool is None else mean_pool_2x2(activated)


def rest(model: nn.Sequential, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The layers after the one of this name."""
    found = False
    for other, layer in model.named_children():
        if found:
            yield other, layer
        found = found or other == name


def packed(maps: Tensor) -> dict[str, Any]:
    """Maps ``(C, H, W)`` as a small message: signed bytes in base64, and what 127 stands for."""
    scale = float(maps.abs().max().clamp_min(1e-12))
    levels = (maps / scale * 127).round().to(torch.int8).contiguous()
    return {
        "shape": list(maps.shape),
        "scale": scale,
        "data": base64.b64encode(levels.numpy().tobytes()).decode(),
    }
