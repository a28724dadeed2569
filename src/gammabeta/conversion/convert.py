"""``convert``: another kind of batch norm in a model, and what follows it in the same pass."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm

import gammabeta.nn as ours

from ..arguments import check_model, check_type
from ..errors import SurgeryError, UsageError
from ..graph.layers import BatchNormLayer, scripted_norms, sharing_copy
from .adapters import Adapted, adapted_class, gives_the_same, tail_of
from .fuse import Outcome, fuse, write_out
from .leave import OTHERS, leave
from .linear import mark
from .rewrite import Rewritten, undo
from .verify import Part, Verified, verify

M = TypeVar("M", bound=Module)

# A kind is a class name of `gammabeta.nn`; {} stands for the dimension. A layer changes its kind by changing
# its class, so each class there has class-level defaults for what its __init__ adds to PyTorch's.
KINDS = {
    "fused": "BatchNorm{}d",
    "ghost": "GhostBatchNorm{}d",
    "frozen": "FrozenBatchNorm{}d",
    "tune": "FrozenBatchNorm{}d",
    "sync": "SyncBatchNorm",
}
_RECOMPUTE = ("fused", "frozen")
_PLAIN: dict[int, type[Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_LAZY: dict[int, type[Module]] = {1: nn.LazyBatchNorm1d, 2: nn.LazyBatchNorm2d, 3: nn.LazyBatchNorm3d}
_TORCH = (*_PLAIN.values(), *_LAZY.values(), nn.SyncBatchNorm)
_FORWARD = _BatchNorm.forward
_SYNCED = (nn.SyncBatchNorm, ours.SyncBatchNorm)


# --- the report -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """One batch norm of a model.

    Attributes:
        layer: its name in ``model.named_modules()``.
        before: its class before.
        after: its class after.
        fused: what is computed in the same pass now, such as ``"residual + relu"``; empty for nothing.
        where: the module whose ``forward`` was rewritten for that; ``""`` is the model itself.
        reason: why nothing (more) was fused, or why the layer was left as it was.
    """

    layer: str
    before: str
    after: str
    fused: str = ""
    where: str | None = None
    reason: str = ""

    @property
    def folded(self) -> str:
        """``fused``, by its name in version 0.1.0."""
        return self.fused

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Read a pickle, one of version 0.1.0 too."""
        vars(self).update({"fused" if name == "folded" else name: value for name, value in state.items()})


@dataclass
class ConversionReport:
    """What was done to each batch norm of a model, in the model's order; ``str()`` of it is a table."""

    to: str
    changes: list[Change] = field(default_factory=list)

    @property
    def fused(self) -> list[Change]:
        """The layers that compute more than a batch norm now."""
        return [change for change in self.changes if change.fused]

    @property
    def left(self) -> list[Change]:
        """The layers whose class is what it was, although another was asked for."""
        return [change for change in self.changes if change.before == change.after]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; ``folded`` is ``fused`` by its name in version 0.1.0."""
        changes = [{**asdict(change), "folded": change.fused} for change in self.changes]
        return {"to": self.to, "changes": changes}

    def __str__(self) -> str:
        head = ("layer", "before", "after", "fused", "reason")
        rows = [(c.layer or "(model)", c.before, c.after, c.fused or "-", c.reason) for c in self.changes]
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(5)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in (head, *rows)
        ]
        changed = sum(c.before != c.after for c in self.changes)
        lines.append(
            f"{len(self.changes)} batch norms: {changed} changed class, "
            f"{len(self.fused)} compute what follows them"
        )
        return "\n".join(lines)


# --- convert ----------------------------------------------------------------------------------------------


def convert(
    model: M,
    to: str = "fused",
    example: Any = None,
    *,
    recompute: bool = False,
    groups: int = 32,
    fit: Iterable[Any] | None = None,
    standardize: bool = False,
) -> M:
    """Return a model with another kind of batch norm: same outputs, gradients and state dict keys.

    ``"tune"`` is for fine-tuning with frozen statistics in less memory: as ``"frozen"``, but gamma and beta
    learn on where they did. A convolution, transposed convolution or Linear in front of a frozen batch norm
    computes with folded weights, and what passes between the two is not kept. Gradients are those of the
    weights as they are.

    ``"fused"``, ``"ghost"``, ``"frozen"`` and ``"sync"`` replace PyTorch's layers, those of other libraries
    (``register_norm``), and each other, by layers of ``gammabeta.nn``. An activation, a residual addition
    and a pooling that follow are computed in the same pass. ``"torch"`` undoes both.

    The given model does not change. The result is a copy that *shares* its parameters and buffers, so an
    optimiser made for one trains the other; use only one of the two afterwards. (``"frozen"`` makes new
    ``Parameter`` objects, without gradient, on the same memory.) Convert before wrapping in
    ``DistributedDataParallel`` and before ``torch.compile``.

    A module whose methods call a batch norm gets a subclass of its class. There a few of their calls wait for
    what follows; all else is the module's own code, so every path gives what it gave. Hooks see what they
    saw. ``"ghost"`` normalises other batches and ``"frozen"`` none, so with those only evaluation gives the
    same outputs.

    ``"group"``, ``"instance"`` and ``"layer"`` lead out of batch norm, to PyTorch's ``GroupNorm``, on a copy
    that shares nothing. They compute something else: give ``fit=``, read the report, go on with ``distil``.

    Args:
        model: any module; a single batch norm too.
        to: "fused", "sync", "ghost", "frozen", "tune" or "torch"; "group", "instance" or "layer".
        example: a tensor, a tuple of arguments or a dict of keyword ones, to compare both models on: in
            evaluation mode, for "fused" and "torch" in training mode too. What makes a difference is taken
            back.
        recompute: for "fused" and "frozen": less memory, more time. Outputs of batch norms are not kept for
            the backward pass but computed again in it, with the same bits.
        groups: for "group": at most so many groups, of at least four channels each, that divide the channels.
        fit: for "group", "instance" and "layer": unlabelled batches, as for ``recalibrate``, on which each
            layer's γ and β are fitted to what the batch norm gave. None: they stay as they were.
        standardize: for the same: keep the weights of convolutions standardised (Qiao et al. 2019).

    Returns:
        The converted model; ``.conversion_report`` says for each batch norm what was done, and why not more.

    Raises:
        UsageError: a kind that does not exist, or ``recompute`` with one that cannot.
        SurgeryError: the model cannot be copied, does not run on ``example``, or is TorchScript.
    """
    check_model("convert", model)
    check_type("convert", "to", to, str, "a kind of batch norm, and the example by name: example=")
    if to not in ("torch", *KINDS, *OTHERS):
        raise UsageError(f"to must be one of {', '.join((*KINDS, *OTHERS))} or torch; got {to!r}")
    if to not in OTHERS and (groups != 32 or fit is not None or standardize):
        raise UsageError(
            f"groups, fit and standardize work with to={' or '.join(map(repr, OTHERS))}; got {to!r}"
        )
    if to in OTHERS and (recompute or example is not None):
        raise UsageError(f"to={to!r} gives other outputs: give fit= instead of example= and recompute=")
    if recompute and to not in _RECOMPUTE:
        raise UsageError(f"recompute=True works with to={' or '.join(map(repr, _RECOMPUTE))}; got {to!r}")
    if isinstance(model, torch.jit.ScriptModule):
        raise SurgeryError(f"{type(model).__name__} is TorchScript; convert the model before it is scripted")
    if to in OTHERS:
        return leave(convert(model, "torch"), to, groups=groups, fit=fit, standardize=standardize)
    try:
        twin = sharing_copy(model)
    except Exception as error:  # a module's own attributes may raise anything when they are copied
        raise SurgeryError(
            f"{type(model).__name__} cannot be copied ({error}); convert it before it is wrapped or compiled"
        ) from error
    report = ConversionReport(to)
    names = {module: name for name, module in reversed(list(twin.named_modules()))}
    layers = [m for m in twin.modules() if isinstance(m, BatchNormLayer)]
    before: dict[Module, str] = {layer: _public_name(layer) for layer in layers}
    kept: dict[Module, str] = {}
    for module in list(twin.modules()):
        if isinstance(module, Rewritten):
            undo(module)
    mark(twin, wanted=to == "tune")
    if to == "torch":
        kept = write_out(twin)
    parts: list[Part] = []
    for layer in layers:
        why = kept.get(layer) or _why_not(layer, to)
        if why:
            kept[layer] = why
            continue
        was = _snapshot(layer)
        _change_class(layer, to)
        if to in _RECOMPUTE:
            layer.recompute = recompute  # type: ignore[assignment]
        parts.append(Part(layer, partial(_restore, layer, was), partial(_restore, layer, _snapshot(layer))))
    done = {} if to == "torch" else fuse(twin)
    verified = Verified({}, {})
    if example is not None:
        parts += [_method_part(module) for module in twin.modules() if isinstance(module, Rewritten)]
        verified = verify(model, twin, example, to in ("fused", "torch"), parts)
    back = {names[module]: why for module, why in verified.taken_back.items()}
    others = [layer for layer in done if layer not in before]  # with code of their own that calls batch_norm
    rows: list[Module] = [*layers, *others]
    for row in rows:
        name = names[row]
        fused, where, reason = done.get(row, Outcome())
        if row in verified.seen:
            fused = verified.seen[row]
            where = (where or "") if fused else None
        if where in back or name in back:
            fused, where, reason = Outcome(reason=back.get(name) or back[str(where)])
        reason = kept.get(row, reason)
        after = _public_name(row)
        if row in others:
            after = f"gammabeta.functional.batch_norm ({after.rpartition('.')[2]})"
        report.changes.append(Change(name, before.get(row) or _public_name(row), after, fused, where, reason))
    for name in scripted_norms(twin):
        kind = f"TorchScript {twin.get_submodule(name).original_name}"
        report.changes.append(Change(name, kind, kind, reason="it is in TorchScript"))
    vars(twin)["conversion_report"] = report
    return twin


_Snapshot = tuple[type[Module], dict[str, Any], dict[str, Any]]


def _snapshot(layer: Module) -> _Snapshot:
    return type(layer), dict(vars(layer)), dict(layer._parameters)


def _restore(layer: Module, state: _Snapshot) -> None:
    layer.__class__, attributes, parameters = state
    vars(layer).clear()
    vars(layer).update(attributes)
    layer._parameters.clear()
    layer._parameters.update(parameters)


def _method_part(module: Module) -> Part:
    made = type(module)
    return Part(module, partial(undo, module), partial(setattr, module, "__class__", made))


def _public_name(layer: Module) -> str:
    """The name under which a user knows the class."""
    cls = type(layer)
    if isinstance(layer, Adapted):
        return f"{_named(layer._normalising)} ({cls.__name__})"
    return _named(getattr(cls, "_base", cls))


def _named(cls: type[Module]) -> str:
    for module in (nn, ours):
        if getattr(module, cls.__name__, None) is cls:
            return f"{module.__name__}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def freeze(layer: Module) -> str:
    """Make a batch norm a frozen one of ours, in place; why it cannot be one, empty if it is."""
    why = _why_not(layer, "frozen") if isinstance(layer, BatchNormLayer) else "it is no batch norm"
    if not why:
        _change_class(layer, "frozen")
    return why


def _dimension(layer: Module) -> int | None:
    """1, 2 or 3, from the class the layer is or was made from."""
    classes = (getattr(layer, "_made_from", None) or type(layer)).__mro__
    for dim, plain in _PLAIN.items():
        if plain in classes or _LAZY[dim] in classes:
            return dim
    return None


def _why_not(layer: Module, to: str) -> str:
    """Why the layer cannot become one of the kind asked for; empty if it can."""
    cls = type(layer)
    if _BatchNorm.forward is not _FORWARD:
        return "another forward was put in place of that of PyTorch's batch norms"
    if _is_foreign(cls):
        tail = tail_of(layer)
        if to == "torch":
            return "it is not one of ours"
        if tail is None or not gives_the_same(layer, _goal(layer, "fused"), tail):
            return f"{cls.__name__} is a class of its own, with a forward that may do more"
    if _dimension(layer) is None and to != "sync" and not (to == "torch" and isinstance(layer, _SYNCED)):
        return "its dimension is not known, because a SyncBatchNorm takes inputs of any dimension"
    if _is_lazy(layer) and to not in ("fused", "torch"):
        return "its size is not known yet: run the model once, then convert"
    if to in ("frozen", "tune") and getattr(layer, "running_mean", None) is None:
        return "it keeps no running statistics, so there is nothing to freeze"
    if to == "torch" and _goal(layer, to) is cls:
        return f"it is a {cls.__name__} already"
    return ""


def _is_foreign(cls: type[Module]) -> bool:
    return (
        cls not in _TORCH
        and not issubclass(cls, Adapted)
        and not cls.__module__.startswith(ours.__name__ + ".")
    )


def _is_lazy(layer: Module) -> bool:
    return isinstance(layer, nn.modules.lazy.LazyModuleMixin)


def _goal(layer: Module, to: str) -> type[Module]:
    """The class of the kind asked for, in the layer's dimension; of PyTorch's or ours."""
    dim = _dimension(layer)
    if to != "torch":
        found: type[Module] = getattr(ours, ("Lazy" if _is_lazy(layer) else "") + KINDS[to].format(dim))
        return found
    return (_LAZY if _is_lazy(layer) else _PLAIN)[dim] if dim else nn.SyncBatchNorm


def _change_class(layer: Module, to: str) -> None:
    """Make the layer one of the kind asked for, which it can become."""
    goal = _goal(layer, to)
    if goal is type(layer) and to != "tune":
        return
    foreign = type(layer)._base if isinstance(layer, Adapted) else type(layer)
    if isinstance(layer, Adapted) or _is_foreign(foreign):
        if to == "torch":
            goal = foreign
        else:
            tail = layer._tail_of if isinstance(layer, Adapted) else tail_of(layer)
            goal = adapted_class(goal, foreign, tail or ())
    dim = _dimension(layer)
    made_from = _PLAIN[dim] if dim else type(layer)
    if isinstance(layer, _SYNCED) and not issubclass(goal, _SYNCED):
        vars(layer).pop("process_group", None)
    _leave_kind(layer, to)
    layer.__class__ = goal
    if to != "torch" and "_tail" in vars(layer):
        layer.activation, layer.pool = vars(layer).pop("_tail")
    if not issubclass(goal, _TORCH):
        layer._made_from = made_from  # type: ignore[assignment]
    if to == "frozen":
        _freeze(layer)
    if to == "tune":
        layer._training_before = layer.training  # type: ignore[assignment]
        layer.train()


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


def _leave_kind(layer: Module, to: str) -> None:
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
        for name in ("activation", "pool", "skip_nonfinite", "initialize", "single", "_warned"):
            state.pop(name, None)
