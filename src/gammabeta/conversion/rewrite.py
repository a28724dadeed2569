"""A module with another ``forward``: a subclass of its class, made from a graph.

Only the code of one ``forward`` changes. The module stays what it was: same class for ``isinstance``, same
methods, children, hooks and state dict. Removing the subclass undoes it. In the graph some modules do more
than before, and some are not called any more. If one of these gets a hook later, or another module takes its
place, the module's own ``forward`` runs. (A module in a container that is looked into is called by its path,
whatever module that is by then.)
"""

import copy
import functools
import itertools
import linecache
from collections.abc import Callable
from typing import Any

from torch.fx import Graph
from torch.fx.graph_module import _format_import_block
from torch.nn import Module, Sequential
from torch.package.importer import sys_importer

from ..graph.layers import hooked

# Modules that do not do what they did: the names on the way to each, its class, its settings.
Guarded = tuple[tuple[tuple[str, ...], type[Module], tuple[tuple[str, Any], ...]], ...]

_CLASSES: dict[Any, type] = {}
_NUMBER = itertools.count()


class Rewritten:
    """Marks a class whose ``forward`` was generated; carries what is needed to make it again."""

    _base: type[Module]
    _source: str
    _imports: str
    _guarded: Guarded

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _restore, (self._base, self._source, self._imports, self._guarded), self.__getstate__()


def _changing(name: str) -> Callable[..., Any]:
    def change(self: Any, *args: Any, **kwargs: Any) -> Any:
        undo(self)
        return getattr(self, name)(*args, **kwargs)

    return change


class _RewrittenSequential(Rewritten):
    """Has its own ``forward`` again once its modules change: the generated one is of those it had."""

    append, insert, extend, pop = map(_changing, ("append", "insert", "extend", "pop"))
    __setitem__, __delitem__ = map(_changing, ("__setitem__", "__delitem__"))
    __iadd__, __imul__ = map(_changing, ("__iadd__", "__imul__"))

    def __getitem__(self, place: Any) -> Any:
        """A module, or for a slice a ``Sequential`` of some, whose ``forward`` is not the whole's."""
        inherited: Any = super()
        found = inherited.__getitem__(place)
        if isinstance(place, slice):
            undo(found)
        return found


def _unchanged(module: Module, guarded: Guarded) -> bool:
    """Whether each of these modules has the class and the settings that it had, and no hook."""
    for names, kind, settings in guarded:
        found: Module | None = module
        for name in names:
            found = None if found is None else found._modules.get(name)
        if found is None or original_class(found) is not kind or hooked(found):
            return False
        for name, value in settings:
            if getattr(found, name, None) != value:
                return False
    return True


def _settings(module: Module) -> tuple[tuple[str, Any], ...]:
    """What an activation or a pooling was made with; of what has parameters or children nothing."""
    if module._modules or module._parameters or module._buffers:
        return ()
    plain = (bool, int, float, str, tuple, list, type(None))
    chosen = {name: value for name, value in vars(module).items() if isinstance(value, plain)}
    return tuple((n, v) for n, v in chosen.items() if not n.startswith("_") and n != "training")


def _guarded(base: type[Module], generated: Callable[..., Any], guarded: Guarded) -> Callable[..., Any]:
    @functools.wraps(generated)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (generated if _unchanged(self, guarded) else base.forward)(self, *args, **kwargs)

    return forward


def _restore(base: type[Module], source: str, imports: str, guarded: Guarded) -> Module:
    """Make the class again in another process, and an instance without attributes."""
    scope: dict[str, Any] = {}
    exec(imports, scope)
    made = _class(base, source, imports, guarded, scope)
    module: Module = made.__new__(made)
    return module


def _class(
    base: type[Module], source: str, imports: str, guarded: Guarded, scope: dict[str, Any]
) -> type[Module]:
    names = tuple(sorted((name, id(value)) for name, value in scope.items() if name != "__builtins__"))
    key = (base, source, names, tuple((path, kind, repr(settings)) for path, kind, settings in guarded))
    if key not in _CLASSES:
        where = f"<gammabeta.convert {base.__name__}.forward {next(_NUMBER)}>"
        linecache.cache[where] = (len(source), None, source.splitlines(keepends=True), where)
        scope = dict(scope)
        exec(compile(source, where, "exec"), scope)
        body = {
            "__module__": base.__module__,
            "__qualname__": f"Fused{base.__name__}",
            "__doc__": base.__doc__,
            "forward": _guarded(base, scope["forward"], guarded),
            "_base": base,
            "_source": source,
            "_imports": imports,
            "_guarded": guarded,
            "_kept": scope,
        }
        mark = _RewrittenSequential if issubclass(base, Sequential) else Rewritten
        _CLASSES[key] = type(f"Fused{base.__name__}", (mark, base), body)
    return _CLASSES[key]


def install(module: Module, graph: Graph, guarded: set[str] | None = None) -> None:
    """Give ``module`` the graph as its ``forward``, as long as the modules at paths ``guarded`` stay."""
    code = graph.python_code("self")
    imports = _format_import_block(code.globals, sys_importer)
    base = original_class(module)
    found = {path: module.get_submodule(path) for path in sorted(guarded or ())}
    kept = tuple((tuple(path.split(".")), original_class(m), _settings(m)) for path, m in found.items())
    module.__class__ = _class(base, code.src, imports, kept, dict(code.globals))


def original_class(module: Module) -> type[Module]:
    """The class a module had before its ``forward`` was rewritten."""
    return module._base if isinstance(module, Rewritten) else type(module)


def undo(module: Module) -> None:
    """Give a rewritten module its own ``forward`` back."""
    module.__class__ = original_class(module)
