"""Let what follows a batch norm join its pass, in every module of a model."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch.nn import Module

from ..epilogue import Epilogue
from ..graph.source import NotReadable
from ..nn.layer import Fused
from .adapters import Adapted, adapt_frozen, learn
from .joined import Described
from .linear import TUNED
from .rewrite import (
    ON_LOAD,
    asks_for_classes,
    install,
    install_in_order,
    mark_plain_code,
    original_class,
    runs_in_order,
)
from .steps import does_nothing_more, quiet, step_of_module


class Outcome(NamedTuple):
    """What happened to a layer: what was fused, the module whose methods were rewritten, why not more."""

    fused: str = ""
    where: str | None = None
    reason: str = ""


def fuse(root: Module) -> dict[Module, Outcome]:
    """Rewrite ``root`` and every module below; what will join each batch norm, as far as it can be told."""
    names = {module: name for name, module in root.named_modules()}
    walk = _Walk()
    walk.watched = {c: m for m in root.modules() if asks_for_classes(m).parts for c in m.children()}
    learn(root)
    for module in _inside_out(root, set()):
        walk.visit(module, names[module])
    for layer in root.modules():
        if isinstance(layer, Adapted) and layer not in walk.outcomes and (alone := walk.starts(layer)):
            walk.outcomes[layer] = Outcome(
                str(alone), names[layer] if str(alone) else None, _why_alone(layer)
            )
    for layer in root.modules():
        if isinstance(layer, Fused) and layer not in walk.outcomes:
            walk.outcomes[layer] = Outcome(reason=_why_alone(layer))
    return walk.outcomes


def write_out(root: Module) -> dict[Module, str]:
    """Mark what layers below ``root`` compute besides, and rewrite their callers; why not, if none is found.

    A marked layer may become one of torch's: what it computed besides is in its ``_tail``.
    """
    native = [m for m in root.modules() if isinstance(m, Fused) and "_made_from" not in vars(m)]
    for layer in native:
        vars(layer)["_tail"] = Epilogue(layer.activation, layer.pool)
    walk = _Walk(written_out=True)
    for module in _inside_out(root, set()):
        walk.visit(module, "")
    kept: dict[Module, str] = {}
    for layer in native:
        if not does_nothing_more(layer) and layer not in walk.written:
            kept[layer] = "it computes more than a batch norm, and no code that calls it was found"
            del vars(layer)["_tail"]
    return kept


def fuse_one(module: Module) -> None:
    """Rewrite one module whose children were rewritten before."""
    _Walk().visit(module, "")


ON_LOAD.append(fuse_one)


def _why_alone(layer: Any) -> str:
    if not does_nothing_more(layer):
        return "it computes what follows it already"
    return (
        "it has hooks, which see its output"
        if not quiet(layer)
        else "no call of it was found in the code around it"
    )


def _inside_out(module: Module, seen: set[Module]) -> Iterator[Module]:
    if module in seen:
        return
    seen.add(module)
    for child in module.children():
        yield from _inside_out(child, seen)
    yield module


def _with_its_tail(layer: Any) -> Described | None:
    return _tail_joined(Described(layer), layer) if does_nothing_more(layer) else None


def _tail_joined(found: Described, layer: Any) -> Described:
    """What a call of an adapted layer starts: the layer, and the modules that it calls itself."""
    for child in (getattr(layer, name) for name in layer._tail_of):
        step = step_of_module(child) if quiet(child) else None
        if step is None or not found.joins(step):
            return Described(None)
    return found


class _Walk:
    """Rewrites modules, each after its children."""

    def __init__(self, written_out: bool = False) -> None:
        self.written_out = written_out
        self.written: set[Module] = set()  # layers with a tail whose callers were rewritten
        self.outcomes: dict[Module, Outcome] = {}
        self.watched: dict[Module, Module] = {}  # modules whose class another asks for, and which one
        self.ends: dict[Module, Described] = {}  # what a call of a rewritten module ends in

    def starts(self, module: Module) -> Described | None:
        """What a call of a module starts: a batch norm, or what a rewritten module ends in."""
        if self.written_out or not quiet(module):
            return None
        if module in self.ends:
            return self.ends[module].again()
        if isinstance(module, Adapted):
            return _with_its_tail(module)
        if TUNED in vars(module):
            convolution = Described(None)
            convolution.linear = module
            return convolution
        if getattr(type(module), "_pending", None) is not None:
            return Described(module if isinstance(module, Fused) else None)
        plain = isinstance(module, Fused) and type(module).forward is Fused.forward
        return Described(module) if plain and does_nothing_more(module) else None  # type: ignore[arg-type]

    def visit(self, module: Module, name: str) -> None:
        """Rewrite one module."""
        if module in self.watched:
            asks = original_class(self.watched[module]).__name__
            self._note_children(module, f"the code of {asks} asks for the class of its modules")
            return
        if not self.written_out and adapt_frozen(module):
            self.ends[module] = _tail_joined(Described(module), module)
            self._keep(module, Outcome(str(self.ends[module]), name, "its output leaves the module"))
            return
        if original_class(module).__module__.startswith(
            ("torch.nn.modules.", "gammabeta.")
        ) and not runs_in_order(module):
            return
        if runs_in_order(module):
            self._in_order(module, name)
            return
        mark_plain_code(module)
        try:
            outlook = install(module, self.starts)
        except NotReadable as why:
            self._note_children(module, f"in the forward of {original_class(module).__name__}: {why}")
            return
        if outlook is None:
            return
        self.written |= outlook.written
        if outlook.returns_waiting:
            self.ends[module] = outlook.returned or Described(None)
        if outlook.functional and not isinstance(module, Fused):
            self._keep(module, Outcome(reason="no call of it was found in the code around it"))
        for layer, (fused, reason) in outlook.fused.items():
            self._keep(layer, Outcome(fused, name if fused else None, reason))

    def _in_order(self, module: Module, name: str) -> None:
        children = list(module.children())
        tails = {child for child in children if any(vars(child).get("_tail", ()))}
        if not tails and not any(self.starts(child) for child in children):
            return
        self.written |= tails
        install_in_order(module)
        waiting: Described | None = None
        for child in children:
            step = step_of_module(child) if quiet(child) else None
            if waiting is not None and step is not None and waiting.joins(step):
                continue
            self._note(waiting, name, f"followed by {original_class(child).__name__}")
            waiting = self.starts(child)
        self._note(waiting, name, "its output leaves the module")
        if waiting is not None:
            self.ends[module] = waiting

    def _note_children(self, module: Module, reason: str) -> None:
        """Say of the batch norms in a module that is left why nothing joins them there."""
        for child in module.children():
            self._note(self.starts(child), None, reason)

    def _note(self, waiting: Described | None, where: str | None, reason: str) -> None:
        if waiting is not None and waiting.layer is not None:
            fused = str(waiting)
            self._keep(waiting.layer, Outcome(fused, where if fused else None, reason))

    def _keep(self, layer: Module, outcome: Outcome) -> None:
        known = self.outcomes.get(layer)
        if known is None or len(outcome.fused) > len(known.fused) or not known.fused:
            self.outcomes[layer] = outcome
