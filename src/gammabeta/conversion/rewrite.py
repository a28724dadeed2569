"""A module with other methods: a subclass of its class, made from the rewritten source.

The module stays what it was: same class for ``isinstance``, same children, hooks and state dict. Removing the
subclass undoes it.
"""

import ast
import copy
import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch.nn import Module, Sequential

from ..graph.source import NotReadable, build, read
from .pending import add, call, hold, iadd, method, now
from .transform import ADD, CALL, HOLD, IADD, METHOD, NOW, Outlook, Starts, has_plain_code, rewrite

_HELPERS = {CALL: call, METHOD: method, ADD: add, IADD: iadd, NOW: now, HOLD: hold}
_CLASSES: dict[Any, type] = {}
#: What rewrites an unpickled module; `fuse` puts it here, and the package imports `fuse`.
ON_LOAD: list[Callable[[Module], None]] = []
_ASKS: dict[type[Module], bool] = {}


class Rewritten:
    """Marks a class some of whose methods were rewritten."""

    _base: type[Module]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def __copy__(self: Any) -> Any:
        made: Any = type(self)
        twin = made.__new__(made)
        twin.__setstate__(self.__dict__.copy())
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (self._base,), self.__getstate__(), None, None, _set_state


class RewrittenSequential(Rewritten):
    """A ``Sequential`` whose modules may join the batch norm before them."""

    def _pending(self: Any, input: Any) -> Any:
        for module in self._modules.values():
            input = call(module, input)
        return input

    def forward(self: Any, input: Any) -> Any:
        """Run the modules in order."""
        if torch.compiler.is_compiling():
            return self._base.forward(self, input)
        return now(self._pending(input))

    def __getitem__(self, place: Any) -> Any:
        """A module, or for a slice a ``Sequential`` of some, which is a plain one."""
        inherited: Any = super()
        found = inherited.__getitem__(place)
        if isinstance(place, slice):
            undo(found)
        return found


def _blank(base: type[Module]) -> Module:
    module: Module = base.__new__(base)
    return module


def _set_state(module: Module, state: Any) -> None:
    """Give an unpickled module its state, and rewrite it again: its class may have other code by now."""
    module.__setstate__(state)
    for again in ON_LOAD:
        again(module)


def _restore(base: type[Module], source: str, imports: str, guarded: Any) -> Module:
    """What the pickles of version 0.1.0 call: they hold a generated forward, which is not used any more."""
    return _blank(base)


def runs_in_order(module: Module) -> bool:
    """Whether the module's forward is that of ``Sequential``."""
    kind = original_class(module)
    plain = issubclass(kind, Sequential) and kind.forward is Sequential.forward
    return plain and kind.__iter__ is Sequential.__iter__  # type: ignore[attr-defined]


def install(module: Module, starts: Starts) -> Outlook | None:
    """Rewrite the methods of ``module`` that call a batch norm; None if there are none.

    Raises:
        NotReadable: why its ``forward`` cannot be rewritten.
    """
    base = original_class(module)
    if asks_for_classes(base):
        raise NotReadable("its code asks for its own class")
    made: dict[str, tuple[Any, Any, Any, bool]] = {}
    whole = Outlook()
    for name, owner, function in _methods(base):
        try:
            found = rewrite(module, read(function), starts)
        except NotReadable:
            if name == "forward":
                raise
            continue
        if found is None:
            continue
        tree, outlook = found
        whole.fused |= {k: v for k, v in outlook.fused.items() if v[0] or k not in whole.fused}
        whole.written |= outlook.written
        whole.functional |= outlook.functional
        if name == "forward":
            whole.returned, whole.returns_waiting = outlook.returned, outlook.returns_waiting
        made[name] = owner, function, tree, name == "forward" and outlook.returns_waiting
    if not made:
        return None
    key = (base, tuple((name, ast.unparse(tree), function) for name, (_, function, tree, _) in made.items()))
    if key not in _CLASSES:
        body: dict[str, Any] = {"_base": base, **_names_of(base)}
        for name, (_, function, tree, waits) in made.items():
            new = build(read(function), tree, _HELPERS)
            body[name] = _guarded(name, function, new)
            if waits:
                body["_pending"] = _unfinished(function, new)
        _CLASSES[key] = type(base.__name__, (Rewritten, base), body)
    module.__class__ = _CLASSES[key]
    return whole


def mark_plain_code(module: Module) -> None:
    """Note of a module whether its forward only calls plain modules, so that a call may wait meanwhile."""
    vars(module).pop("_plain_code", None)
    base = original_class(module)
    try:
        found = "forward" not in vars(module) and has_plain_code(module, read(base.forward))
    except NotReadable:
        return
    if found:
        vars(module)["_plain_code"] = True


def install_in_order(module: Module) -> None:
    """Let the modules of a ``Sequential`` join the batch norms before them."""
    base = original_class(module)
    key = (base, "in order")
    if key not in _CLASSES:
        _CLASSES[key] = type(base.__name__, (RewrittenSequential, base), {"_base": base, **_names_of(base)})
    module.__class__ = _CLASSES[key]


def _names_of(base: type[Module]) -> dict[str, Any]:
    return {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}


def _methods(base: type[Module]) -> list[tuple[str, type, FunctionType]]:
    """The methods of a class, and which class of its bases defines each; none of torch's or ours."""
    found: dict[str, tuple[str, type, FunctionType]] = {}
    for owner in base.__mro__:
        if owner.__module__.startswith(("torch.nn.", "gammabeta.")) or owner in (Module, object):
            continue
        for name, function in vars(owner).items():
            if isinstance(function, FunctionType) and not (name.startswith("__") and name.endswith("__")):
                found.setdefault(name, (name, owner, function))
    inherited = {name for name in found if getattr(base, name, None) is not found[name][2]}
    return [entry for name, entry in found.items() if name not in inherited]


def asks_for_classes(base: type[Module]) -> bool:
    """Whether a method of the class reads the class of anything; a rewritten module has another one."""
    if base not in _ASKS:
        found = [{*function.__code__.co_names} for _, _, function in _methods(base)]
        _ASKS[base] = any(names & {"type", "__class__"} for names in found)
    return _ASKS[base]


def _guarded(name: str, original: FunctionType, rewritten: FunctionType) -> Callable[..., Any]:
    """The rewritten method, as long as the class has the one that it was made from.

    A compiler that reads the code gets the method as written: it fuses for itself.
    """
    code, defaults = original.__code__, original.__defaults__

    @functools.wraps(original)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        now_there = getattr(self._base, name)
        same = now_there is original and original.__code__ is code and original.__defaults__ is defaults
        if not same or torch.compiler.is_compiling():
            return getattr(self._base, name)(self, *args, **kwargs)
        return now(rewritten(self, *args, **kwargs))

    return run


def _unfinished(original: FunctionType, rewritten: FunctionType) -> Callable[..., Any]:
    """``forward`` for a caller that may join what it returns."""
    code, defaults = original.__code__, original.__defaults__

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        now_there = self._base.forward
        same = now_there is original and original.__code__ is code and original.__defaults__ is defaults
        return (rewritten if same else now_there)(self, *args, **kwargs)

    return run


def original_class(module: Module) -> type[Module]:
    """The class a module had before some of its methods were rewritten."""
    return module._base if isinstance(module, Rewritten) else type(module)


def undo(module: Module) -> None:
    """Give a rewritten module its own methods back."""
    module.__class__ = original_class(module)
