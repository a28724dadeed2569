"""One forward pass over a whole example, in each mode: what it reaches, how often, and what it writes."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..graph.layers import BatchNormLayer, batch_norm_layers
from ..stats.observe import observed
from ..stats.preserve import overwrite, preserved, same_bits
from .trace import tensors

Held = dict[str, Tensor]


def calls(model: nn.Module, run: Callable[[], Any]) -> Counter[str]:
    """How often ``run()`` calls each layer."""
    counted: Counter[str] = Counter()
    with (
        observed(model, batch_norm_layers(model), lambda name, _layer, _x: counted.update([name])),
        torch.no_grad(),
    ):
        run()
    return counted


def unreached(model: nn.Module, run: Callable[[], Any], called: set[str]) -> tuple[str, ...]:
    """Layers that ``run()``, in evaluation, neither calls nor reads the statistics of.

    A forward may use a layer without calling it (``F.batch_norm`` on its buffers). So the statistics of all
    layers that are not called become NaN for one pass: if that changes the output, none of them is named.
    """
    layers = batch_norm_layers(model)
    silent = {name: layer for name, layer in layers.items() if name not in called}
    if not silent:
        return ()
    with torch.no_grad():
        with preserved(model):
            before = tensors(run())
        with preserved(model):
            for layer in silent.values():
                if layer.running_mean is not None:
                    overwrite(layer.running_mean, torch.full_like(layer.running_mean, torch.nan))
            after = tensors(run())
    same = len(before) == len(after) and all(map(same_bits, before, after))
    return tuple(silent) if same else ()


@contextmanager
def writing(model: nn.Module) -> Iterator[list[str]]:
    """A list that gets the modules whose statistics change meanwhile and that are no batch norm known here.

    Statistics are rows of floating-point numbers: buffers, plain attributes, arrays, lists of numbers, what
    lists and dictionaries hold of these, and what hooks enclose; parameters too, of classes that are not
    PyTorch's. The caller preserves them.
    """
    known = (BatchNormLayer, nn.Sequential)
    others = {n: module for n, module in model.named_modules() if n and not isinstance(module, known)}
    before = {name: {key: t.clone() for key, t in _statistics(m)} for name, m in others.items()}
    written: list[str] = []
    yield written
    for name, module in others.items():
        for key, tensor in _statistics(module):
            old = before[name].get(key)
            if old is not None and old.shape == tensor.shape and not same_bits(old, tensor):
                written.append(name)
                break


def _statistics(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    held: dict[str, Any] = {key: value for key, value in vars(module).items() if not key.startswith("_")}
    held |= module._buffers
    if not type(module).__module__.startswith("torch."):
        held |= module._parameters  # those of PyTorch's own classes are weights, moved by who averages them
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        cells = getattr(hook, "__closure__", None) or ()
        held |= {f"hook {index}": cell.cell_contents for index, cell in enumerate(cells)}
    for key, value in held.items():
        yield from _numbers(key, value)


def _numbers(key: str, value: Any, depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    array = isinstance(value, np.ndarray) and value.dtype.kind == "f"
    if array or (isinstance(value, list) and value and all(isinstance(item, float) for item in value)):
        value = torch.tensor(value)
    if isinstance(value, Tensor) and value.is_floating_point() and value.dim():
        yield key, value.detach()
    elif isinstance(value, list | tuple | dict) and depth < 3:
        for inner, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers(f"{key}.{inner}", item, depth + 1)
