"""One small forward pass, watched: what stands before and after each layer, and what the backward updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..graph.layers import batch_norm_layers
from ..stats.preserve import same_bits
from .evidence import Surroundings
from .static import WEIGHTED

_RELUS = {F.relu, F.relu6, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
_DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout}


@dataclass(frozen=True)
class _Tag:
    """What is known of a tensor: the module that made it, and a dropout since the last normalization."""

    producer: str | None = None
    bias: bool = False
    layer: str | None = None
    dropout: float = 0.0
    direct: bool = False


class _Watch(TorchFunctionMode):
    """Follows tensors through functions. The tensors are kept alive, so that identities stay unique."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: dict[int, _Tag] = {}
        self.kept: list[Tensor] = []
        self.found: dict[str, Surroundings] = {}

    def tag(self, tensor: Any, tag: _Tag) -> None:
        if isinstance(tensor, Tensor):
            self.tags[id(tensor)] = tag
            self.kept.append(tensor)

    def of(self, tensor: Any) -> _Tag:
        return self.tags.get(id(tensor), _Tag()) if isinstance(tensor, Tensor) else _Tag()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        for group in args:
            if isinstance(group, list | tuple):
                inputs += [a for a in group if isinstance(a, Tensor)]
        before = [self.of(a) for a in inputs]
        out = func(*args, **kwargs)
        if not isinstance(out, Tensor):
            return out
        if func in _DROPOUTS:
            probability = float(kwargs.get("p", args[1] if len(args) > 1 else 0.5))
            self.tag(out, _Tag(dropout=probability, direct=True))
            return out
        if func in _RELUS and before and before[0].layer is not None:
            name = before[0].layer
            self.found[name] = replace(self.found[name], relu_after=True)
        dropout = max((tag.dropout for tag in before), default=0.0)
        if dropout or id(out) in self.tags:
            self.tag(out, _Tag(dropout=dropout))
        return out


def surroundings(model: nn.Module, run: Callable[[], Any]) -> dict[str, Surroundings]:
    """Trace ``run()``, a forward pass of ``model`` in evaluation on a few samples."""
    watch = _Watch()
    with _hooks(model, watch), watch, torch.no_grad():
        run()
    for name, layer in batch_norm_layers(model).items():
        if name in watch.found and getattr(layer, "activation", None) in ("relu", "relu6"):
            watch.found[name] = replace(watch.found[name], relu_after=True)
    return watch.found


@contextmanager
def _hooks(model: nn.Module, watch: _Watch) -> Iterator[None]:
    handles: list[Any] = []
    for name, module in model.named_modules():
        if isinstance(module, WEIGHTED):
            handles.append(module.register_forward_hook(_produced(watch, name)))
    for name, layer in batch_norm_layers(model).items():
        handles.append(layer.register_forward_pre_hook(_entered(watch, name), with_kwargs=True))
        handles.append(layer.register_forward_hook(_left(watch, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _produced(watch: _Watch, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        dropout = max((watch.of(x).dropout for x in inputs), default=0.0)
        watch.tag(output, _Tag(producer=name, bias=module.bias is not None, dropout=dropout))

    return hook


def _entered(watch: _Watch, name: str) -> Callable[..., None]:
    def hook(_module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        tag = watch.of(inputs[0] if inputs else next(iter(keywords.values())))
        earlier = watch.found.get(name)
        if earlier is not None:
            watch.found[name] = replace(earlier, calls=(earlier.calls or 0) + 1)
        else:
            watch.found[name] = Surroundings(
                tag.producer, tag.bias, dropout=tag.dropout, dropout_direct=tag.direct, calls=1
            )

    return hook


def _left(watch: _Watch, name: str) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        watch.tag(output, _Tag(layer=name))

    return hook


def updated_in_backward(model: nn.Module, run: Callable[[], Any]) -> tuple[str, ...]:
    """Names of the layers whose running statistics change while gradients are computed.

    That is what recomputation (activation checkpointing) does: the forward pass runs again during the
    backward, and updates again. The caller preserves buffers; gradients are put back here.
    """
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with torch.inference_mode(False), torch.enable_grad():
            outputs = [out for out in tensors(run()) if out.requires_grad]
            if not outputs:
                return ()
            layers = batch_norm_layers(model)
            before = {name: _statistics(layer) for name, layer in layers.items()}
            torch.autograd.backward(torch.stack([out.float().square().mean() for out in outputs]).sum())
            after = {name: _statistics(layer) for name, layer in layers.items()}
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
    return tuple(name for name in before if _differ(before[name], after[name]))


def _statistics(layer: Any) -> list[Tensor]:
    return [
        t.clone() for t in (layer.running_mean, layer.running_var, layer.num_batches_tracked) if t is not None
    ]


def _differ(one: list[Tensor], other: list[Tensor]) -> bool:
    return any(not same_bits(a, b) for a, b in zip(one, other, strict=True))


def tensors(value: Any) -> list[Tensor]:
    """Every floating-point tensor in a model's output, however it is nested."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        return [t for item in value.values() for t in tensors(item)]
    if isinstance(value, list | tuple):
        return [t for item in value for t in tensors(item)]
    return []
