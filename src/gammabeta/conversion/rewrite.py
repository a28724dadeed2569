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
from .calls import ADD, CALL, HOLD, IADD, METHOD, NOW
from .class_checks import Asked, asked
from .expressions import Starts
from .joined import Outlook
from .pending import add, call, hold, iadd, method, now
from .transform import has_plain_code, rewrite

_HELPERS = {CALL: call, METHOD: method, ADD: add, IADD: iadd, NOW: now, HOLD: hold}
_CLASSES: dict[Any, type] = {}
_is_compiling = torch.compiler.is_compiling
#: What rewrites an unpickled module; `fuse` puts it here, and the package imports `fuse`.
ON_LOAD: list[Callable[[Module], None]] = []


class Rewritten:
    """Marks a class some of whose methods were rewritten."""

    _base: type[Module]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Not that of the class: whoever keeps a list of the subclasses, or allows none, is not asked."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        own = getattr(self._base, "__deepcopy__", None)
        if own is not None:
            return own(self, memo)
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def __copy__(self: Any) -> Any:
        own = getattr(self._base, "__copy__", None)
        if own is not None:
            return own(self)
        made: Any = type(self)
        twin = made.__new__(made)
        twin.__setstate__(self.__dict__.copy())
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        base = self._base
        if base.__reduce_ex__ is object.__reduce_ex__ and base.__reduce__ is object.__reduce__:
            return _blank, (base,), self.__getstate__(), None, None, _set_state
        own: Any = base.__reduce_ex__(self, protocol)  # pickle finds the class that has a name
        return own if isinstance(own, str) else tuple(_with_base(part, type(self), base) for part in own)


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


def _with_base(part: Any, made: type, base: type) -> Any:
    """A part of what ``__reduce_ex__`` gives, with the class itself in place of the one made from it."""
    if type(part) is tuple:
        return tuple(_with_base(one, made, base) for one in part)
    return base if part is made else part


def subclass(bases: tuple[type, ...], body: dict[str, Any]) -> Any:
    """A subclass named as the last of ``bases``, made past the checks and lists of that and of its metaclass.

    The first of the bases has an ``__init_subclass__`` that ends there.
    """
    base = bases[-1]
    named = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type.__new__(type(base), base.__name__, bases, {**named, **body})


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
    if asks_for_classes(module).itself:
        raise NotReadable("its code asks for its own class")
    made: dict[str, tuple[Any, Any, Any, bool]] = {}
    whole = Outlook()
    methods = {name: (owner, function) for name, owner, function in _methods(base)}
    for name, (tree, outlook) in _rewritten_methods(module, methods, starts).items():
        owner, function = methods[name]
        whole.fused |= {k: v for k, v in outlook.fused.items() if v[0] or k not in whole.fused}
        whole.written |= outlook.written
        whole.functional |= outlook.functional
        if name == "forward":
            whole.returned, whole.returns_waiting = outlook.returned, outlook.returns_waiting
        made[name] = owner, function, tree, outlook.returns_waiting
    if not made:
        return None
    key = (base, tuple((name, ast.unparse(tree), function) for name, (_, function, tree, _) in made.items()))
    if key not in _CLASSES:
        body: dict[str, Any] = {"_base": base}
        for name, (_, function, tree, waits) in made.items():
            new = build(read(function), tree, _HELPERS)
            body[name] = _guarded(name, function, new)
            if waits and name == "forward":
                body["_pending"] = _unfinished(name, function, new)
            elif waits:
                body[name].unfinished = _unfinished(name, function, new)
        _CLASSES[key] = subclass((Rewritten, base), body)
    module.__class__ = _CLASSES[key]
    return whole


def _rewritten_methods(
    module: Module, methods: dict[str, tuple[type, FunctionType]], starts: Starts
) -> dict[str, tuple[ast.FunctionDef, Outlook]]:
    """The methods that call a batch norm, or one of these that ends in such a call; by their names."""
    ending: frozenset[str] = frozenset()
    while True:
        found = {}
        for name, (_, function) in methods.items():
            try:
                found[name] = rewrite(module, read(function), starts, ending)
            except NotReadable:
                if name == "forward":
                    raise
        made = {name: one for name, one in found.items() if one is not None}
        more = frozenset(name for name, (_, o) in made.items() if o.returns_waiting and name != "forward")
        if more <= ending:
            return made
        ending |= more


def mark_plain_code(module: Module) -> None:
    """Note of a module whether its forward only calls plain modules, so that a call may wait meanwhile."""
    if isinstance(module, torch.jit.ScriptModule):  # its class has no forward
        return
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
        _CLASSES[key] = subclass((RewrittenSequential, base), {"_base": base})
    module.__class__ = _CLASSES[key]


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


def asks_for_classes(module: Module) -> Asked:
    """Whether the module's code reads its own class, or those of others; a rewritten one is another."""
    base = original_class(module)
    return asked(base, module, {name: function for name, _, function in _methods(base)})


def _guarded(name: str, original: FunctionType, rewritten: FunctionType) -> Callable[..., Any]:
    """The rewritten method, as long as the class has the one that it was made from.

    A compiler that reads the code gets the method as written: it fuses for itself.
    """
    code, defaults, named = original.__code__, original.__defaults__, original.__kwdefaults__

    @functools.wraps(original)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        now_there = getattr(self._base, name)
        same = (
            now_there is original
            and original.__code__ is code
            and original.__defaults__ is defaults
            and original.__kwdefaults__ is named
        )
        if not same or _is_compiling():
            return now_there(self, *args, **kwargs)
        return now(rewritten(self, *args, **kwargs))

    return run


def _unfinished(name: str, original: FunctionType, rewritten: FunctionType) -> Callable[..., Any]:
    """A method for a caller that may join what it returns."""
    code, defaults, named = original.__code__, original.__defaults__, original.__kwdefaults__

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        now_there = getattr(self._base, name)
        same = (
            now_there is original
            and original.__code__ is code
            and original.__defaults__ is defaults
            and original.__kwdefaults__ is named
        )
        return (rewritten if same else now_there)(self, *args, **kwargs)

    return run


def original_class(module: Module) -> type[Module]:
    """The class a module had before some of its methods were rewritten."""
    return module._base if isinstance(module, Rewritten) else type(module)


def undo(module: Module) -> None:
    """Give a rewritten module its own methods back."""
    module.__class__ = original_class(module)
