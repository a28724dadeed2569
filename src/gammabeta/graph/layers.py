"""A model and its modules: what wraps it, hooks, which modules are batch norms, which of these are frozen.

One rule for the whole package: a module with any hook is left as it is. It keeps its own call, and what goes
in and comes out of it stays what it was. A hook on all modules (torch's ``register_module_forward_hook`` and
its like) counts as one on each.
"""

from __future__ import annotations

import copy
from types import CellType, FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

BatchNormLayer = _BatchNorm
M = TypeVar("M", bound=nn.Module)
_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``, ``DistributedDataParallel``, ``DataParallel``, ``AveragedModel``.

    Their ``forward`` would replay a compiled graph that misses hooks, start collectives that ranks with
    unequal numbers of batches never finish, or hide which keywords the model takes.
    """
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, _WRAPPERS):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def sharing_copy(model: M) -> M:
    """A copy of the modules that holds the very same parameters, buffers and ScriptModules."""
    shared = (*model.parameters(), *model.buffers())
    memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}
    memo |= {id(m): m for m in model.modules() if isinstance(m, torch.jit.ScriptModule)}
    twin = copy.deepcopy(model, memo)
    rebind_closures(twin, memo)
    return twin


def rebind_closures(twin: nn.Module, memo: dict[int, Any]) -> None:
    """Let functions that the modules of a copy hold reach the copy, where they close over the original."""
    for module in twin.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, FunctionType) and value.__closure__:
                vars(module)[name] = _closed_over_copies(value, memo)


def _closed_over_copies(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """The function with the copies in its closure, where it has what was copied; ``deepcopy`` keeps these."""
    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(CellType(memo.get(id(cell.cell_contents), cell.cell_contents)))
        except ValueError:  # not set yet
            cells.append(cell)
    made = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells)
    )
    made.__kwdefaults__ = function.__kwdefaults__
    vars(made).update(vars(function))
    return made


def batch_norm_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """Every batch-normalization module once, under its first name, in order of registration."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def scripted_norms(model: nn.Module) -> list[str]:
    """The names of the batch norms that are TorchScript, alone or within a larger part."""
    scripted = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    return [name for name, module in scripted if "BatchNorm" in str(getattr(module, "original_name", ""))]


def is_frozen_class(layer: nn.Module) -> bool:
    """Whether the class itself never updates its statistics (``FrozenBatchNorm2d`` and the like)."""
    return any(base.__name__.startswith("FrozenBatchNorm") for base in type(layer).__mro__)


def frozen_layers(model: nn.Module) -> set[str]:
    """Names of the layers whose statistics are frozen.

    Frozen are: layers of a ``FrozenBatchNorm`` class; layers set to evaluation inside a model that trains;
    and, in a model set to evaluation as a whole (where modes say nothing), layers none of whose affine
    parameters require a gradient while other parameters of the model do.
    """
    layers = batch_norm_layers(model)
    others_learn = any(parameter.requires_grad for parameter in model.parameters())
    frozen = set()
    for name, layer in layers.items():
        affine: list[Tensor] = [p for p in (layer.weight, layer.bias) if p is not None]
        held = bool(affine) and not any(p.requires_grad for p in affine) and others_learn
        in_eval = not layer.training and (model.training or held)
        if is_frozen_class(layer) or in_eval:
            frozen.add(name)
    return frozen


def replace_module(model: nn.Module, path: str, new: nn.Module) -> nn.Module:
    """Put ``new`` wherever the model holds the module at ``path``; return the root, which it may be."""
    old = model.get_submodule(path)
    new.train(old.training)
    if old is model:
        return new
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
    return model


# --- hooks ------------------------------------------------------------------------------------------------

#: The attributes of a module that hold its hooks, and what each kind is called.
KINDS = {
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
}
#: The hooks on all modules, in the same order; torch fills and empties these dictionaries in place.
ON_ALL_MODULES = tuple(getattr(torch_module, f"_global{name}") for name in KINDS)


def hooked(module: nn.Module) -> bool:
    """Whether anything is called with what goes in or comes out of the module, or with its gradients."""
    for name in KINDS:
        if getattr(module, name, None):
            return True
    return any(ON_ALL_MODULES)  # an empty dictionary is False


def hook_on(module: nn.Module) -> str:
    """The first hook found on the module, in words; empty if there is none."""
    for name, kind in KINDS.items():
        if getattr(module, name, None):
            return f"a {kind}"
    for hooks, kind in zip(ON_ALL_MODULES, KINDS.values(), strict=True):
        if hooks:
            return f"a global {kind}"
    return ""
