"""Whether the code of a module looks at the class of a module: a rewritten one has a subclass of its own.

Looked at is what a call can reach: ``forward``, methods that name a part of the module, and what these call.
A class's name, and what it hands down to subclasses, is the same for a subclass.
"""

import ast
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch.nn import Module

from ..graph.source import tree_of

_SAME_NAME = ("__name__", "__qualname__")


class Asked(NamedTuple):
    """Of what the code of a module asks for the exact class."""

    itself: bool
    parts: bool


_KNOWN: dict[tuple[type[Module], frozenset[str]], Asked] = {}


def asked(base: type[Module], module: Module, methods: dict[str, FunctionType]) -> Asked:
    """What the code of ``module`` asks; ``methods``: those of its class ``base`` that are not torch's."""
    if isinstance(module, torch.jit.ScriptModule):
        return Asked(False, False)
    parts = frozenset({*module._modules, *module._parameters, *module._buffers})
    key = base, parts
    if key not in _KNOWN:
        found = [_asked_in(function, base, method) for function, method in _reached(methods, parts)]
        _KNOWN[key] = Asked(any(f.itself for f in found), any(f.parts for f in found))
    return _KNOWN[key]


def _reached(methods: dict[str, FunctionType], parts: frozenset[str]) -> Iterator[tuple[FunctionType, bool]]:
    """What runs when the module is called or its parts are, as far as names in the code tell.

    And of each function whether it is a method of the module, decorated or not.
    """
    first = ("forward", "__call__")
    waiting = [(f, True) for name, f in methods.items() if name in first or _names(f) & parts]
    seen: set[FunctionType] = set()
    while waiting:
        function, method = waiting.pop()
        if function in seen:
            continue
        seen.add(function)
        yield function, method
        if (inside := getattr(function, "__wrapped__", None)) is not None:
            waiting.append((inside, method))
        names = _names(function)
        waiting += [(methods[name], True) for name in names & methods.keys()]
        around = {**function.__globals__, **_closure(function)}
        called = [around.get(name) for name in names]
        waiting += [
            (f, False)
            for f in called
            if isinstance(f, FunctionType) and f is not inside and str(f.__module__).split(".")[0] != "torch"
        ]


def _closure(function: FunctionType) -> dict[str, Any]:
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not set yet
            continue
    return found


def _names(function: FunctionType) -> set[str]:
    """The names in a function and in those written inside it."""
    found: set[str] = set()
    waiting = [function.__code__]
    while waiting:
        code = waiting.pop()
        found |= {*code.co_names, *code.co_freevars}
        waiting += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return found


def _asked_in(function: FunctionType, base: type[Module], method: bool) -> Asked:
    if not _names(function) & {"type", "__class__"}:
        return Asked(False, False)
    tree = tree_of(function)
    if tree is None:
        return Asked(True, True)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    me = tree.args.args[0].arg if tree.args.args else ""
    itself = parts = False
    for node in ast.walk(tree):
        of = _whose_class(node, parents)
        if of is None:
            continue
        use: Any = parents.get(node)
        own = isinstance(of, ast.Name) and of.id == me
        reads = isinstance(use, ast.Attribute) and isinstance(use.ctx, ast.Load)
        if reads and (use.attr in _SAME_NAME or (own and method and _handed_down(base, use.attr))):
            continue
        itself, parts = itself or own or not method, parts or not (own and method)
    return Asked(itself, parts)


def _whose_class(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> ast.AST | None:
    """What an expression gives the class of; any other use of ``type`` counts as one of anything."""
    if isinstance(node, ast.Attribute) and node.attr == "__class__":
        return node.value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "type":
        return node.args[0] if len(node.args) == 1 else None
    if isinstance(node, ast.Name) and node.id == "type":
        use = parents.get(node)
        called = isinstance(use, ast.Call) and use.func is node
        tested = isinstance(use, ast.Call) and isinstance(use.func, ast.Name) and use.func.id == "isinstance"
        return None if called or tested else node
    return None


def _handed_down(base: type[Module], name: str) -> bool:
    """Whether a subclass has the same attribute: anything but a method, which may be rewritten."""
    missing = object()
    value = getattr(base, name, missing)
    return not name.startswith("__") and value is not missing and not isinstance(value, FunctionType)
