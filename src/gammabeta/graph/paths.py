"""Whether two modules meet on every path through a model, as far as its source tells.

A run shows that the output of one module went into another. Another input, argument or method may part them.
They surely meet if they stand next to each other in a ``Sequential``, or if the only two places in the source
that reach them stand one after the other, with no branch between that could part them.
"""

import ast
import builtins
from collections.abc import Iterator, Mapping
from itertools import pairwise
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn import Module, Sequential

from .source import UNKNOWN, NotReadable, Source, live_value, read

_CONDITIONAL = (ast.IfExp, ast.BoolOp, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_LEAVES = (ast.Return, ast.Break, ast.Continue, ast.Raise, ast.Yield, ast.YieldFrom, ast.Await)
_BUILD = ("__init__", "reset_parameters", "init_weights", "_init_weights", "extra_repr", "reset_classifier")
_LISTS_MODULES = {"children", "named_children", "modules", "named_modules", "_modules", "get_submodule"}


class Paths:
    """What the methods of a model's modules reach, read once."""

    def __init__(self, model: Module) -> None:
        self.parents: dict[Module, list[Module]] = {}
        self.mentions: dict[Module, list[_Mention]] = {}
        self.hidden: set[Module] = set()  # modules whose children may be reached in ways that are not seen
        for module in model.modules():
            for child in module.children():
                self.parents.setdefault(child, []).append(module)
        for module in model.modules():
            if not type(module).__module__.startswith("torch.nn.modules."):
                self._look(module)

    def _look(self, module: Module) -> None:
        for name, function in _methods(type(module)):
            if name in _BUILD:
                continue
            try:
                source = read(function)
            except NotReadable:
                self.hidden.add(module)
                continue
            for mention in _mentions(module, source):
                self.mentions.setdefault(mention.of, []).append(mention)
            self.hidden |= set(_hidden(module, source))

    def part(self, one: Module, other: Module) -> str:
        """Why the output of ``one`` may not go into ``other`` on some path; empty if it surely does."""
        why = _on_a_condition(one) or _on_a_condition(other)
        if one is other or why:
            return why
        mine, theirs = self._outwards(one), self._outwards(other)
        common = next((m for m in mine if m in theirs), None)
        if common is None:
            return "another path may reach one without the other"
        up, down = mine[: mine.index(common)], theirs[: theirs.index(common)]
        for chain, last in ((up, True), (down, False)):
            for inner, outer in pairwise(chain):
                if not _at_the_end(inner, outer, last=last):
                    return f"{type(outer).__name__} may reach one without the other"
        if any(len(self.parents.get(m, ())) > 1 for m in (*up, *down)):
            return "one of them is held in several places"
        if any(self._seen(m) for m in (*up[:-1], *down[:-1])):
            return "one of them is also called from elsewhere"
        first, second = (up or [one])[-1], (down or [other])[-1]
        if _runs_in_order(common):
            return self._adjacent(common, first, second)
        return self._in_one_block(common, first, second)

    def _outwards(self, module: Module) -> list[Module]:
        """The module and those it lies in, innermost first."""
        found = [module]
        while found[-1] in self.parents:
            outer = self.parents[found[-1]][0]
            if outer in found:
                break
            found.append(outer)
        return found

    def _seen(self, module: Module) -> bool:
        return bool(self.mentions.get(module))

    def _adjacent(self, common: Module, first: Module, second: Module) -> str:
        if self._seen(first) or self._seen(second) or common in self.hidden:
            return "one of them is also reached by its place in the Sequential"
        return ""

    def _in_one_block(self, common: Module, first: Module, second: Module) -> str:
        if common in self.hidden:
            return f"the code of {type(common).__name__} reaches its modules in ways that are not seen"
        places = [self.mentions.get(module, []) for module in (first, second)]
        if any(len(found) != 1 or found[0].owner is not common for found in places):
            return f"the code of {type(common).__name__} does not reach each of them in one place"
        (one,), (other,) = places
        if one.source is not other.source or not (one.called and other.called):
            return f"they are called in different methods of {type(common).__name__}"
        return _one_after_the_other(one, other)


def _runs_in_order(module: Module) -> bool:
    kind = type(module)
    return (
        isinstance(module, Sequential) and kind.forward in _ORDERED and kind.__iter__ is Sequential.__iter__  # type: ignore[attr-defined]
    )


_ORDERED = {Sequential.forward}


def _at_the_end(inner: Module, outer: Module, *, last: bool) -> bool:
    """Whether ``inner`` is the last (or first) that ``outer``, a plain ``Sequential``, runs."""
    children = list(outer.children())
    return _runs_in_order(outer) and bool(children) and children[-1 if last else 0] is inner


def _methods(kind: type[Module]) -> Iterator[tuple[str, FunctionType]]:
    seen: set[str] = set()
    for owner in kind.__mro__:
        if owner is Module or owner.__module__.startswith(("torch.nn.modules.", "gammabeta.")):
            continue
        for name, function in vars(owner).items():
            function = function.fget if isinstance(function, property) else function
            if isinstance(function, FunctionType) and name not in seen:
                seen.add(name)
                yield name, function


# --- mentions ---------------------------------------------------------------------------------------------


class _Mention:
    """One place in a method where a module is reached."""

    def __init__(self, of: Module, owner: Module, source: Source, way: list[ast.AST]) -> None:
        self.of, self.owner, self.source = of, owner, source
        self.way = way  # the nodes from the method inwards
        outer = way[-1]
        if isinstance(way[-2], ast.Attribute) and way[-2].attr == "forward":  # called without its hooks
            outer = way[-2]
        around = way[way.index(outer) - 1]
        self.called = isinstance(around, ast.Call) and around.func is outer


class _Names(Mapping[str, Any]):
    def __init__(self, module: Module, source: Source) -> None:
        code = source.function.__code__
        self.local = {*code.co_varnames, *code.co_cellvars}
        self.known = {**source.free, **({code.co_varnames[0]: module} if code.co_argcount else {})}
        self.globals = source.function.__globals__

    def __getitem__(self, name: str) -> Any:
        if name in self.known:
            return self.known[name]
        if name in self.local:
            raise KeyError(name)
        return self.globals[name] if name in self.globals else vars(builtins)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.known)

    def __len__(self) -> int:
        return len(self.known)


def _mentions(module: Module, source: Source) -> Iterator[_Mention]:
    """The outermost expressions that stand for a module, and are not only compared with None."""
    names = _Names(module, source)

    def walk(node: ast.AST, way: list[ast.AST]) -> Iterator[_Mention]:
        way = [*way, node]
        if isinstance(node, ast.Attribute | ast.Subscript):
            value = live_value(node, module, names)
            if isinstance(value, Module) and value is not module:
                if not _only_compared(way):
                    yield _Mention(value, module, source, way)
                return
        for child in ast.iter_child_nodes(node):
            yield from walk(child, way)

    for statement in source.tree.body:
        yield from walk(statement, [source.tree])


def _only_compared(way: list[ast.AST]) -> bool:
    around = way[-2]
    if isinstance(around, ast.Compare):
        return all(isinstance(op, ast.Is | ast.IsNot) for op in around.ops)
    tested = isinstance(around, ast.If | ast.IfExp) and around.test is way[-1]
    return (
        tested
        or isinstance(around, ast.BoolOp)
        or (isinstance(around, ast.UnaryOp) and isinstance(around.op, ast.Not))
    )


def _hidden(module: Module, source: Source) -> Iterator[Module]:
    """Modules whose children the method may reach in ways that do not show."""
    names = _Names(module, source)
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and node.attr in _LISTS_MODULES:
            owner = live_value(node.value, module, names)
            yield owner if isinstance(owner, Module) else module
        if isinstance(node, ast.Call) and _looks_up(node) and live_value(node, module, names) is UNKNOWN:
            yield module
        if isinstance(node, ast.Attribute | ast.Subscript | ast.Name):
            value = live_value(node, module, names)
            if isinstance(value, nn.ModuleList | nn.ModuleDict):
                yield value


def _looks_up(node: ast.Call) -> bool:
    """Whether a call may look up any attribute."""
    named = len(node.args) > 1 and isinstance(node.args[1], ast.Constant)
    return isinstance(node.func, ast.Name) and node.func.id in ("getattr", "vars") and not named


def _on_a_condition(module: Module) -> str:
    """Why a module of another library may not always compute what it computed; empty for torch's and ours."""
    kind = type(module)
    torchs = kind.__module__.startswith(("torch.nn.modules.", "gammabeta."))
    if torchs or isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
        return ""
    try:
        source = read(kind.forward)
    except NotReadable as why:
        return f"the forward of {kind.__name__} cannot be read ({why})"
    names = _Names(module, source)
    for statement in source.tree.body:
        ends = any(isinstance(n, _LEAVES) for n in ast.walk(statement)) and not isinstance(
            statement, ast.Return
        )
        if ends:
            return f"a branch in {kind.__name__} may end it earlier"
        for node in ast.walk(statement):
            if isinstance(node, ast.Call) and live_value(node.func, module, names) in _NORMALIZING:
                within = any(isinstance(n, ast.stmt) and n is not statement for n in ast.walk(statement))
                return f"{kind.__name__} normalises on a condition" if within else ""
    branches = any(isinstance(n, ast.If | ast.IfExp | ast.While | ast.Try) for n in ast.walk(source.tree))
    return f"a branch in {kind.__name__} may part them" if branches else ""


_NORMALIZING = (nn.functional.batch_norm, torch.batch_norm)


# --- blocks -----------------------------------------------------------------------------------------------


def _one_after_the_other(one: _Mention, other: _Mention) -> str:
    """Why a branch may part two calls in one method; empty if none can."""
    lists = [_block(mention.way) for mention in (one, other)]
    (block, i, conditional), (other_block, j, other_conditional) = lists
    if conditional or other_conditional:
        return "one of them is called on a condition"
    if block is not other_block:
        return "a branch may part them"
    if i > j:
        return "they are called in another order"
    between = block[i + 1 : j]
    names = {n.id for n in ast.walk(block[i]) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    for statement in between:
        if any(isinstance(n, _LEAVES) for n in ast.walk(statement)):
            return "the method may end between them"
        inside = any(isinstance(n, ast.stmt) for n in ast.walk(statement) if n is not statement)
        mentioned = any(isinstance(n, ast.Name) and n.id in names for n in ast.walk(statement))
        conditional = inside or any(isinstance(n, _CONDITIONAL) for n in ast.walk(statement))
        if mentioned and conditional:
            return "a branch between them may change what goes from one to the other"
    return ""


def _block(way: list[ast.AST]) -> tuple[list[ast.stmt], int, bool]:
    """The innermost list of statements with a node, its place there, whether it may not be evaluated."""
    for outer, inner in zip(reversed(way[:-1]), reversed(way[1:]), strict=True):
        if not isinstance(inner, ast.stmt):
            continue
        for _, value in ast.iter_fields(outer):
            if isinstance(value, list) and any(v is inner for v in value):
                at = next(k for k, v in enumerate(value) if v is inner)
                within = way[way.index(inner) + 1 :]
                return value, at, any(isinstance(n, _CONDITIONAL) for n in within)
    return [], 0, True
