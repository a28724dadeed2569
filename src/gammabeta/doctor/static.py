"""Facts that need no data: modules, buffers, the optimiser, the loader's own description."""

import hashlib
from collections.abc import Sized
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import UsageError
from ..graph.layers import BatchNormLayer, batch_norm_layers, frozen_layers, is_frozen_class
from ..nn import SyncBatchNorm
from ..stats.preserve import preserved
from .evidence import Layer, LoaderShape, Optimizer, Ranks, Surroundings

WEIGHTED: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
WEIGHTED += (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
RELUS = (nn.ReLU, nn.ReLU6)


def read_layers(model: nn.Module, held: set[str] | None = None) -> list[Layer]:
    """Every batch-normalization module of ``model``, once; ``held``: what ``held_layers`` gave, if known."""
    held = held_layers(model) if held is None else held
    frozen = frozen_layers(model) | held
    return [
        _read(name, layer, frozen=name in frozen, held=name in held)
        for name, layer in batch_norm_layers(model).items()
    ]


def held_layers(model: nn.Module) -> set[str]:
    """Names of the layers that stay in evaluation when ``train()``, overridden by a model, is called.

    An overridden ``train()`` may do more than set modes, so ``requires_grad`` is put back, too.
    """
    if all(type(module).train is nn.Module.train for module in model.modules()):
        return set()
    learns = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with preserved(model):
            model.train()
            return {name for name, layer in batch_norm_layers(model).items() if not layer.training}
    except Exception:  # the model's own code; nothing is known then
        return set()
    finally:
        for parameter, required in learns:
            if parameter.requires_grad != required:
                parameter.requires_grad_(required)


def _read(name: str, layer: BatchNormLayer, *, frozen: bool, held: bool) -> Layer:
    if isinstance(layer.weight, nn.UninitializedParameter):
        raise UsageError(f"{name or 'the model'} is lazy and has no size yet: run it once, then diagnose it")
    affine = [p for p in (layer.weight, layer.bias) if p is not None]
    counter = layer.num_batches_tracked
    return Layer(
        name=name,
        kind=type(layer).__name__,
        channels=layer.num_features,
        eps=layer.eps,
        momentum=layer.momentum,
        training=layer.training,
        frozen=frozen,
        held=held,
        frozen_class=is_frozen_class(layer),
        tracks=layer.track_running_stats,
        synchronized=isinstance(layer, nn.SyncBatchNorm | SyncBatchNorm),
        mean=_copy(layer.running_mean),
        var=_copy(layer.running_var),
        buffer_dtype=None if layer.running_mean is None else layer.running_mean.dtype,
        updates=None if counter is None else int(counter),
        weight=_copy(layer.weight),
        bias=_copy(layer.bias),
        parameter_dtype=affine[0].dtype if affine else None,
        affine_learns=any(p.requires_grad for p in affine) if affine else None,
    )


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().to("cpu", torch.float64, copy=True)


def read_sequences(model: nn.Module) -> dict[str, Surroundings]:
    """Surroundings that ``nn.Sequential`` alone guarantees, for when nothing can be run."""
    first_name = {layer: name for name, layer in batch_norm_layers(model).items()}
    return {
        first_name[child]: _in_sequence(list(module.named_children()), index, path)
        for path, module in model.named_modules()
        if isinstance(module, nn.Sequential)
        for index, child in enumerate(module.children())
        if child in first_name
    }


def _in_sequence(children: list[tuple[str, nn.Module]], index: int, path: str) -> Surroundings:
    earlier = (module for _, module in reversed(children[:index]))
    last = next((module for module in earlier if isinstance(module, (BatchNormLayer, *DROPOUTS))), None)
    name, before = children[index - 1] if index else ("", None)
    producer = before if isinstance(before, WEIGHTED) else None
    after = children[index + 1][1] if index + 1 < len(children) else None
    return Surroundings(
        producer=None if producer is None else f"{path}.{name}".lstrip("."),
        producer_bias=producer is not None and producer.bias is not None,
        relu_after=isinstance(after, RELUS),
        dropout=last.p if isinstance(last, DROPOUTS) else 0.0,
        dropout_direct=isinstance(before, DROPOUTS),
    )


def read_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Optimizer | None:
    """Steps taken, and which layers' weight and bias are in a group with weight decay."""
    if optimizer is None:
        return None
    counts = [int(state["step"]) for state in optimizer.state.values() if "step" in state]
    counted = getattr(optimizer, "_step_count", 0)  # a scheduler's wrapper keeps count for SGD, too
    steps = max(counts, default=0) or (int(counted) or None)
    decay = {
        id(parameter): float(group.get("weight_decay", 0.0))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    decayed: dict[str, tuple[str, ...]] = {}
    strongest = 0.0
    for name, layer in batch_norm_layers(model).items():
        for key in ("weight", "bias"):
            strength = decay.get(id(getattr(layer, key)), 0.0)
            if strength > 0:
                decayed[name] = (*decayed.get(name, ()), key)
                strongest = max(strongest, strength)
    return Optimizer(steps, decayed, strongest)


def read_loader(loader: Any) -> LoaderShape | None:
    """What a ``DataLoader`` over a sized data set says about itself."""
    data, size = getattr(loader, "dataset", None), getattr(loader, "batch_size", None)
    if data is None or not isinstance(size, int) or not hasattr(data, "__len__"):
        return None
    sampler = getattr(loader, "sampler", None)
    samples = len(sampler if isinstance(sampler, Sized) else data)
    return LoaderShape(samples, size, bool(getattr(loader, "drop_last", False)))


def read_ranks(model: nn.Module) -> Ranks | None:
    """Compare every layer's buffers over the ranks; every rank must call this."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    mine = {name: _digest(layer) for name, layer in batch_norm_layers(model).items()}
    everyone: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    differing = tuple(name for name in mine if len({buffers.get(name) for buffers in everyone}) > 1)
    return Ranks(len(everyone), differing)


def _digest(layer: nn.Module) -> str:
    hasher = hashlib.sha256()
    for _, buffer in sorted(layer.named_buffers()):
        hasher.update(buffer.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()
