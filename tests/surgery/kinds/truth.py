"""The statistics that ``recalibrate`` should find, watched from below: at torch's operator."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from .harness import Call, mapped, seed


class _Watch(TorchDispatchMode):
    """Normalise by the batch whatever has running statistics of a layer, and pool its moments."""

    def __init__(self, layers: dict[int, str]) -> None:
        super().__init__()
        self.layers = layers
        self.seen: dict[str, list[Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.native_batch_norm.default:
            values, weight, bias, mean, _var, *_, eps = args
            name = None if mean is None else self.layers.get(mean.data_ptr())
            if name is not None:
                self.seen.setdefault(name, []).append(values.transpose(0, 1).flatten(1))
                return func(values, weight, bias, None, None, True, 0.0, eps)
        return func(*args, **(kwargs or {}))


@contextmanager
def _modes(model: nn.Module) -> Iterator[None]:
    for module in model.modules():
        module.training = False
    yield


def statistics(model: nn.Module, one: Call) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and unbiased variance of the input of each batch norm that a call reaches, on a copy."""
    twin = copy.deepcopy(model)
    layers = {
        m.running_mean.data_ptr(): name
        for name, m in twin.named_modules()
        if isinstance(m, _BatchNorm) and m.running_mean is not None
    }
    seed(3)
    with torch.no_grad(), _modes(twin), _Watch(layers) as watch:
        args, kwargs = mapped((one.args, one.kwargs), torch.clone)
        one(twin, *args, **kwargs)
    pooled = {name: torch.cat(parts, 1) for name, parts in watch.seen.items()}
    return {name: (p.mean(1), p.var(1)) for name, p in pooled.items()}
