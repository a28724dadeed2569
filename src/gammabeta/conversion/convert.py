"""``convert``: another kind of batch norm in a model, and what follows it in the same pass."""

import copy
from typing import Any, TypeVar

from torch import nn
from torch.nn import Module

import gammabeta.nn as ours

from ..errors import SurgeryError, UsageError
from .fuse import Outcome, fold_frames
from .report import Change, ConversionReport
from .rewrite import Rewritten, undo
from .unfuse import unfold_frames
from .verify import verify

M = TypeVar("M", bound=Module)

# A kind is a class name of `gammabeta.nn`; {} stands for the dimension. A layer changes its kind by changing
# its class, so each class there has class-level defaults for what its __init__ adds to PyTorch's.
KINDS = {
    "fused": "BatchNorm{}d",
    "ghost": "GhostBatchNorm{}d",
    "frozen": "FrozenBatchNorm{}d",
    "sync": "SyncBatchNorm",
}
_RECOMPUTE = ("fused", "frozen")
_PLAIN: dict[int, type[Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_LAZY: dict[int, type[Module]] = {1: nn.LazyBatchNorm1d, 2: nn.LazyBatchNorm2d, 3: nn.LazyBatchNorm3d}


def convert(model: M, to: str = "fused", example: Any = None, *, recompute: bool = False) -> M:
    """Return a model with another kind of batch norm: same outputs, gradients and state dict keys.

    ``"fused"``, ``"ghost"``, ``"frozen"`` and ``"sync"`` put the layers of ``gammabeta.nn`` in the place of
    PyTorch's and of each other, and fold into them a following activation, residual addition and 2x2 mean
    pool wherever the code of the module around them proves it safe. ``"torch"`` undoes both.

    The model given stays as it is. The one returned is a copy that *shares* its parameters and buffers, so an
    optimiser made for the one trains the other; continue with one of the two. (``"frozen"`` makes new
    ``Parameter`` objects, without gradient, on the same memory.) Convert before wrapping in
    ``DistributedDataParallel`` and before ``torch.compile``.

    Where something is folded, the ``forward`` of the module around it is replaced by the graph of calls it
    makes, in a subclass of its class: what it reads from attributes that are not tensors or modules is as
    it was at conversion. Hooks keep working; a layer with hooks is not folded. ``"ghost"`` normalises other
    batches and ``"frozen"`` none, so with those only evaluation gives the same outputs.

    Args:
        model: any module; a lone batch norm too.
        to: "fused", "sync", "ghost", "frozen" or "torch".
        example: an input, or a tuple of inputs, to compare both models on: in evaluation mode, for "fused"
            and "torch" in training mode too.
        recompute: for "fused" and "frozen": less memory for some more time. Outputs of batch norms are not
            kept for the backward pass but computed again in it, to the last bit the same.

    Returns:
        The converted model; ``.conversion_report`` says of each batch norm what was done and why no more.

    Raises:
        UsageError: a kind that does not exist, or ``recompute`` with one that cannot.
        SurgeryError: the model cannot be copied, or does not give the same outputs on ``example``.
    """
    if to != "torch" and to not in KINDS:
        raise UsageError(f"to must be one of {', '.join(KINDS)} or torch; got {to!r}")
    if recompute and to not in _RECOMPUTE:
        raise UsageError(f"recompute=True goes with to={' or '.join(map(repr, _RECOMPUTE))}; got {to!r}")
    twin = _sharing_copy(model)
    report = ConversionReport(to)
    names = {module: name for name, module in reversed(list(twin.named_modules()))}
    layers = [m for m in twin.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = {layer: _public_name(layer) for layer in layers}
    kept: dict[Module, str] = {}
    done: dict[Module, Outcome] = {}
    if to == "torch":
        for module in list(twin.modules()):
            if isinstance(module, Rewritten):
                undo(module)
        kept = unfold_frames(twin)
    for layer in layers:
        if layer not in kept:
            why = _change_class(layer, to)
            if why is not None:
                kept[layer] = why
            elif to in _RECOMPUTE:
                layer.recompute = recompute  # type: ignore[assignment]
    if to != "torch":
        done = fold_frames(twin)
    for layer in layers:
        folded, where, reason = done.get(layer, ("", None, ""))
        reason = kept.get(layer, reason)
        report.changes.append(Change(names[layer], before[layer], _public_name(layer), folded, where, reason))
    vars(twin)["conversion_report"] = report
    if example is not None:
        verify(model, twin, example, training=to in ("fused", "torch"))
    return twin


def _public_name(layer: Module) -> str:
    """The name under which a user knows the class."""
    cls = type(layer)
    for module in (nn, ours):
        if getattr(module, cls.__name__, None) is cls:
            return f"{module.__name__}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def _sharing_copy(model: M) -> M:
    """A copy of the modules that holds the very same parameters and buffers."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                memo[id(tensor)] = tensor
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever a module's own attributes raise when they are copied
        raise SurgeryError(
            f"{type(model).__name__} cannot be copied ({error}); convert it before it is wrapped or compiled"
        ) from error


def _dimension(layer: Module) -> int | None:
    """1, 2 or 3, from the class the layer is or was made from."""
    classes = (getattr(layer, "_made_from", None) or type(layer)).__mro__
    for dim, plain in _PLAIN.items():
        if plain in classes or _LAZY[dim] in classes:
            return dim
    return None


def _change_class(layer: Module, to: str) -> str | None:
    """Make the layer one of the kind asked for; the reason if it stays as it is."""
    cls = type(layer)
    lazy = isinstance(layer, nn.modules.lazy.LazyModuleMixin)
    known = cls in (*_PLAIN.values(), *_LAZY.values(), nn.SyncBatchNorm) or cls.__module__.startswith(
        ours.__name__ + "."
    )
    if not known:
        return f"{cls.__name__} is a class of its own, with a forward that may do more"
    dim = _dimension(layer)
    synced = issubclass(cls, nn.SyncBatchNorm | ours.SyncBatchNorm)
    if dim is None and to != "sync" and not (synced and to == "torch"):
        return "its dimension is not known: SyncBatchNorm takes all"
    if lazy and to not in ("fused", "torch"):
        return "its size is not known yet: run the model once, then convert"
    if to == "frozen" and getattr(layer, "running_mean", None) is None:
        return "it keeps no running statistics, so there is nothing to freeze"
    if to == "torch":
        goal = (_LAZY if lazy else _PLAIN)[dim] if dim else nn.SyncBatchNorm
    else:
        goal = getattr(ours, ("Lazy" if lazy else "") + KINDS[to].format(dim))
    if goal is cls:
        return f"it is a {cls.__name__} already" if to == "torch" else None
    _leave(layer, to)
    if not issubclass(goal, (*_PLAIN.values(), *_LAZY.values(), nn.SyncBatchNorm)):
        layer._made_from = _PLAIN[dim] if dim else cls  # type: ignore[assignment]
    if synced and not issubclass(goal, nn.SyncBatchNorm | ours.SyncBatchNorm):
        vars(layer).pop("process_group", None)
    layer.__class__ = goal
    if to == "frozen":
        _freeze(layer)
    return None


def _freeze(layer: Module) -> None:
    """Parameters without gradient on the same memory; the model given keeps its own, gradient and all."""
    layer._training_before = layer.training  # type: ignore[assignment]
    layer._trained = []  # type: ignore[assignment]
    for name, parameter in list(layer._parameters.items()):
        if parameter is not None:
            if parameter.requires_grad:
                layer._trained.append(name)  # type: ignore[operator, union-attr]
            layer._parameters[name] = nn.Parameter(parameter.detach(), requires_grad=False)
    layer.train()


def _leave(layer: Module, to: str) -> None:
    """Undo what belongs to the kind the layer is of, and drop the settings the next kind does not have."""
    state = vars(layer)
    for name in state.pop("_trained", []):
        parameter = layer._parameters[name]
        if parameter is not None:
            layer._parameters[name] = nn.Parameter(parameter.detach())
    if "_training_before" in state:
        layer.training = state.pop("_training_before")
    state.pop("_made_from", None)
    state.pop("virtual_batch_size", None)
    state.pop("recompute", None)
    if to == "torch":
        for name in ("activation", "pool", "skip_nonfinite", "initialize"):
            state.pop(name, None)
