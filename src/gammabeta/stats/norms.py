"""Which modules of a model keep a mean and a variance, whoever wrote them, and which are held still."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..graph.layers import BatchNormLayer, is_frozen_class
from .preserve import preserved

# How classes name what they keep; the first pair that a module has counts.
NAMES = tuple(
    (f"{prefix}mean", f"{prefix}{variance}")
    for prefix in ("running_", "moving_", "population_", "pop_", "ema_", "avg_", "")
    for variance in ("var", "variance")
)


def norms(model: nn.Module) -> dict[str, Any]:
    """Every batch normalization once, under its first name, in order of registration.

    PyTorch's classes, ours and their subclasses; scripted, traced and exported ones; and any other module
    that keeps a mean and a variance of the same shape among its buffers or parameters.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BatchNormLayer) or own_names(module) is not None
    }


def own_names(module: nn.Module) -> tuple[str, str] | None:
    """The names of a foreign module's mean and variance; None where it keeps none."""
    scripted = isinstance(module, torch.jit.ScriptModule)
    if isinstance(module, _NormBase) or (scripted and "Instance" in str(module.original_name)):
        return None  # torch's own classes: batch normalization is known, and instance normalization is none
    held = dict(module.named_parameters("", False)) | dict(module.named_buffers("", False))
    for mean, var in NAMES:
        if mean in held and var in held and held[mean].shape == held[var].shape and held[mean].numel():
            return mean, var
    return None


def statistics(module: Any) -> tuple[Tensor, Tensor] | None:
    """A norm's mean and variance, as it keeps them; None where it keeps none."""
    mean, var = own_names(module) or ("running_mean", "running_var")
    pair = getattr(module, mean), getattr(module, var)
    return None if pair[0] is None or pair[1] is None else pair


def with_statistics(model: nn.Module) -> dict[str, Any]:
    """The norms that keep a mean and a variance now, as ``norms`` names them."""
    return {name: layer for name, layer in norms(model).items() if statistics(layer) is not None}


def channels(module: Any) -> int:
    """How many channels a norm has."""
    if isinstance(module, BatchNormLayer):
        return module.num_features
    kept = statistics(module)
    return 0 if kept is None else kept[0].numel()


def affine(module: Any) -> list[Tensor]:
    """A norm's parameters that learn, or could."""
    kept = own_names(module) or ()
    return [p for name, p in module.named_parameters("", False) if name not in kept]


def frozen_norms(model: nn.Module, found: dict[str, Any]) -> dict[str, str]:
    """The norms whose statistics their owner holds still, each with what holds it.

    Frozen are: layers of a ``FrozenBatchNorm`` class; layers in evaluation inside a model that trains, or
    that the model's own ``train()`` leaves in evaluation; and, in a model set to evaluation as a whole (where
    modes say nothing), layers none of whose parameters require a gradient while others of the model do.
    """
    others_learn = any(parameter.requires_grad for parameter in model.parameters())
    held = _held_in_evaluation(model, found)
    reasons = {}
    for name, layer in found.items():
        learns = [p.requires_grad for p in affine(layer)]
        if is_frozen_class(layer):
            reasons[name] = "its class is frozen"
        elif name in held:
            reasons[name] = f"train() of {held[name]} holds it in evaluation"
        elif not layer.training and model.training:
            reasons[name] = "it is in evaluation while the model trains"
        elif not layer.training and learns and not any(learns) and others_learn:
            reasons[name] = "its parameters are frozen"
    return reasons


def _held_in_evaluation(model: nn.Module, found: dict[str, Any]) -> dict[str, str]:
    """The norms that an overridden ``train()`` leaves in evaluation, each with the class that does so."""
    owners = {
        path: type(module)
        for path, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)
        and type(module).train is not nn.Module.train
        and not is_frozen_class(module)
    }
    if not owners:
        return {}
    with preserved(model):
        try:
            model.train()
        except Exception:  # a model that refuses to train, as exported ones do: nothing is known
            return {}
        left = [name for name, layer in found.items() if not layer.training]
    outwards = sorted(owners, key=len, reverse=True)
    return {name: _owner(name, outwards, owners) for name in left}


def _owner(name: str, outwards: list[str], owners: dict[str, type]) -> str:
    """The class of the innermost module around a layer that overrides ``train()``."""
    around = (path for path in outwards if path == "" or f"{name}.".startswith(f"{path}."))
    return next((owners[path].__name__ for path in around), "the model")
