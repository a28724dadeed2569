"""What the code of a model reaches: in which places of its source each module is called, or handed on.

All methods of the classes of a model's modules are read, and the functions that they hand modules to. Nothing
is run. What cannot be seen is told: code that lists modules, looks them up by a computed name, or is not at
hand may reach any of them.
"""

import ast
import functools
from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

from torch import Tensor
from torch.nn import Module, ModuleDict, ModuleList

from .source import UNKNOWN, Names, NotReadable, Source, callee, live_value, looks_up, read
from .spread import spreads

# What builds or describes a model; not what data goes through.
_BUILD = {"__init__", "reset_parameters", "init_weights", "_init_weights", "extra_repr", "reset_classifier"}
_LISTS_MODULES = {"children", "named_children", "modules", "named_modules", "_modules", "get_submodule"}
_LISTS_MODULES |= {"__dict__", "__class__"}
_ASKS = {"isinstance", "issubclass", "type", "id", "hasattr", "getattr", "setattr", "super", "repr", "str",
         "print", "callable", "len", "bool"}  # fmt: skip
_RUNS_WHOLE = {"checkpoint", "checkpoint_sequential", "checkpoint_seq"}  # of torch and timm
_STORES = {"append", "extend", "insert", "add", "add_module", "register_module", "update"}
_PLAIN = (bool, int, float, str, tuple, type(None))


def is_torchs_name(module: str) -> bool:
    """Whether a module of Python's is one with torch's layers, or with ours."""
    return module.startswith(("torch.nn.", "torch.ao.", "gammabeta."))


def of_torch(function: Any) -> bool:
    """Whether a function is torch's own or built in: a run shows all that it does with tensors."""
    if isinstance(function, BuiltinFunctionType | type):
        return True
    owner = getattr(function, "__module__", None) or ""
    return callable(function) and owner.split(".")[0] in ("torch", "math", "operator", "einops")


class Mention:
    """One place in the source where a module is reached.

    Attributes:
        of: the module.
        owner: the module whose method it is in; in a function, the module that was handed to it.
        source: the method or function.
        way: the nodes from it inwards to the expression that stands for the module.
        called: whether the module is called there, with what stands in the call.
    """

    def __init__(self, of: Module, owner: Module, source: Source, way: list[ast.AST]) -> None:
        self.of, self.owner, self.source = of, owner, source
        outer = len(way) - 1
        above = way[-2]
        if isinstance(above, ast.Attribute) and above.attr == "forward":  # called without its hooks
            outer -= 1
        around = way[outer - 1]
        self.called = isinstance(around, ast.Call) and around.func is way[outer]
        self.way = way[:outer] if self.called else way

    @property
    def node(self) -> ast.AST:
        """The call of the module, or the expression that stands for it."""
        return self.way[-1]


class Reach:
    """Where the source of a model reaches its modules.

    Attributes:
        mentions: the places of each module.
        hidden: modules whose children may be reached in ways that are not seen.
        opened: modules handed to code that is not seen: all that is in them may be reached.
        loose: names of attributes that are taken from objects of which it is not known what they are.
        held: modules that are also kept elsewhere than among their parent's children.
    """

    def __init__(self, model: Module) -> None:
        self.mentions: dict[Module, list[Mention]] = {}
        self.hidden: set[Module] = set()
        self.opened: set[Module] = set()
        self.loose: set[str] = set()
        self.held: set[Module] = set()
        self._read: set[tuple[Any, ...]] = set()
        for module in model.modules():
            self.held |= set(_kept(module))
            if not type(module).__module__.startswith(("torch.", "gammabeta.")):
                self._methods(module)

    def _methods(self, module: Module) -> None:
        methods = [(n, f) for n, f in methods_of(type(module)) if n not in _BUILD]
        named: set[str] = set()  # what other methods use
        for _, function in methods:
            if not _takes_nothing(function):
                named |= {*function.__code__.co_names}
        for name, function in methods:
            try:
                source = read(function)
            except NotReadable:
                self.hidden.add(module)
                self.opened.add(module)
                continue
            # It takes no data, and no other method calls it: what it does not call, it only looks at.
            quiet = _takes_nothing(function) and name not in named
            _View(self, module, source, Names.of_method(module, source), quiet).read()

    def function(self, module: Module, function: FunctionType, bound: Mapping[str, Module]) -> bool:
        """Read a function that modules were handed to; tell whether it could be read."""
        key = (function.__code__, *sorted((n, id(m)) for n, m in bound.items()))
        if key in self._read:
            return True
        self._read.add(key)
        try:
            source = read(function)
        except NotReadable:
            return False
        _View(self, module, source, Names(source, bound), quiet=False).read()
        return True


def methods_of(kind: type) -> Iterator[tuple[str, FunctionType]]:
    """The methods and properties that a class defines beyond torch's and ours, by name."""
    seen: set[str] = set()
    for owner in kind.__mro__:
        rewritten = "_base" in vars(owner)  # by convert: the methods that it was made from count
        if rewritten or owner is Module or owner.__module__.startswith(("torch.nn.modules.", "gammabeta.")):
            continue
        for name, held in vars(owner).items():
            function = held.fget if isinstance(held, property) else held
            if getattr(function, "__globals__", {}).get("__name__") == "torch.utils._contextlib":
                function = getattr(function, "__wrapped__", None)  # under torch.no_grad
            if isinstance(function, FunctionType) and name not in seen:
                seen.add(name)
                yield name, function


def _takes_nothing(function: FunctionType) -> bool:
    code = function.__code__
    return code.co_argcount <= 1 and not code.co_kwonlyargcount and not code.co_flags & 0x0C


class _View:
    """The reading of one method or function for one module."""

    def __init__(self, reach: Reach, module: Module, source: Source, names: Names, quiet: bool) -> None:
        self.reach, self.module, self.source, self.names, self.quiet = reach, module, source, names, quiet
        self.loops = quiet and _calls_a_local(source)

    def read(self) -> None:
        for way in _chains(self.source):
            self._chain(way)

    def _chain(self, way: list[ast.AST]) -> None:
        """Look at ``a.b[0].c`` from its whole to its parts."""
        node = way[-1]
        value = self._value(node)
        if isinstance(node, ast.Call):  # getattr
            if isinstance(value, Module):
                self._reached(value, way)
            elif value is UNKNOWN:
                self._looked_up(node)
        elif isinstance(node, ast.Attribute | ast.Subscript):
            if isinstance(value, Module):
                if isinstance(value, ModuleList | ModuleDict):
                    self._hide(value, node)
                self._reached(value, way)
                return
            if value is not UNKNOWN and isinstance(value, _PLAIN):
                return
            if isinstance(node, ast.Attribute):
                self._attribute(node, way)
            if isinstance(node.value, ast.Attribute | ast.Subscript | ast.Name) or looks_up(node.value):
                self._chain([*way, node.value])
        elif isinstance(value, Module):
            self._bare(value, way)

    def _value(self, node: ast.AST) -> Any:
        return live_value(node, self.module, self.names) if isinstance(node, ast.expr) else UNKNOWN

    def _attribute(self, node: ast.Attribute, way: list[ast.AST]) -> None:
        owner = self._value(node.value)
        if node.attr in _LISTS_MODULES:
            self._hide(owner if isinstance(owner, Module) else self.module, node.value)
        if owner is UNKNOWN and isinstance(node.ctx, ast.Load):
            called = isinstance(way[-2], ast.Call) and way[-2].func is node
            tensors = hasattr(Tensor, node.attr) and not _may_be_a_module(node.value, self.source)
            if not tensors and (called or not self.quiet):
                self.reach.loose.add(node.attr)

    def _looked_up(self, node: ast.Call) -> None:
        """``getattr`` of something, or by some name, that is not known."""
        owner, name = (self._value(argument) for argument in node.args[:2])
        if isinstance(name, str):
            self.reach.loose.add(name)
        else:
            self._hide(owner if isinstance(owner, Module) else self.module, node, depth=1)

    def _hide(self, module: Module, node: ast.AST | None, *, depth: int = 0) -> None:
        """Note that a module's children may be reached from ``node``, which stands for it or for a child."""
        if not self.quiet or self.loops:
            self.reach.hidden.add(module)
            if node is not None and spreads(node, self.source, depth=depth - _holds_lists(module)):
                self.reach.opened.add(module)

    def _reached(self, value: Module, way: list[ast.AST]) -> None:
        """A module that an attribute stands for."""
        mention = Mention(value, self.module, self.source, way)
        if not mention.called and (_only_compared(way) or self.quiet):
            return
        handed = None if mention.called else self._handed(value, way)
        if handed:
            return
        self.reach.mentions.setdefault(value, []).append(mention)
        if handed is False and spreads(way[-1], self.source, depth=-_holds_lists(value)):
            self.reach.opened.add(value)

    def _bare(self, value: Module, way: list[ast.AST]) -> None:
        """A module that a name stands for: ``self``, or what a function was given."""
        above = way[-2]
        if isinstance(above, ast.Attribute | ast.Subscript) and above.value is way[-1]:
            if isinstance(above, ast.Subscript):
                self._hide(value, way[-1])
            return
        if isinstance(above, ast.Call) and above.func is way[-1]:
            self.reach.mentions.setdefault(value, []).append(Mention(value, self.module, self.source, way))
        elif not (_only_compared(way) or isinstance(above, ast.Return)):
            handed = self._handed(value, way)
            if not handed:
                self._hide(value, way[-1] if handed is False else None)

    def _handed(self, value: Module, way: list[ast.AST]) -> bool | None:
        """Look at what a module is given to: whether nothing becomes of it there; None if that is noted."""
        call = next(n for n in reversed(way[:-1]) if not isinstance(n, ast.Starred | ast.keyword))
        if not isinstance(call, ast.Call) or call.func is way[-1]:
            return False
        target = callee(call.func, self.module, self.names)
        name = getattr(target, "__name__", "")
        if isinstance(target, BuiltinFunctionType | type) or (target is UNKNOWN and _stores(call)):
            return name in _ASKS
        if isinstance(target, FunctionType) and name in _RUNS_WHOLE and _root(target) in ("torch", "timm"):
            return True
        plain = isinstance(target, FunctionType) and not of_torch(target)
        bound = _bound(call, target, self._value) if plain else None
        if not self.quiet and (bound is None or not self.reach.function(self.module, target, bound)):
            self.reach.opened.add(value)
        return None


def _holds_lists(module: Module) -> bool:
    """Whether its children are lists of modules, which nobody can call; then what is in these is called."""
    lists = (ModuleList, ModuleDict)
    return isinstance(module, lists) and all(isinstance(child, lists) for child in module.children())


def _root(function: FunctionType) -> str:
    return (function.__module__ or "").partition(".")[0]


def _stores(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Attribute) and call.func.attr in _STORES


def _bound(call: ast.Call, function: FunctionType, value: Any) -> dict[str, Module] | None:
    """The modules among the arguments of a call, by the parameters' names; None if that cannot be told."""
    code = function.__code__
    parameters = list(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
    owner = value(call.func.value) if isinstance(call.func, ast.Attribute) else UNKNOWN
    given: list[Any] = [owner] if isinstance(owner, Module) else []
    for argument in call.args:
        if isinstance(argument, ast.Starred):
            return None
        given.append(value(argument))
    if len(given) > code.co_argcount:
        return None
    bound = dict(zip(parameters, given, strict=False))
    for keyword in call.keywords:
        if keyword.arg is None or keyword.arg not in parameters:
            return None
        bound[keyword.arg] = value(keyword.value)
    return {name: one for name, one in bound.items() if isinstance(one, Module)}


@lru_cache(maxsize=4096)
def _chains(source: Source) -> tuple[list[ast.AST], ...]:
    """The ways to all outermost attributes, subscripts and names of a function."""
    found: list[list[ast.AST]] = []

    def walk(node: ast.AST, way: list[ast.AST]) -> None:
        way = [*way, node]
        if isinstance(node, ast.Call) and looks_up(node) and len(node.args) > 1:
            found.append(way)
        if isinstance(node, ast.Attribute | ast.Subscript | ast.Name):
            found.append(way)
            inner: ast.AST = node
            while isinstance(inner, ast.Attribute | ast.Subscript):
                if isinstance(inner, ast.Subscript):
                    walk(inner.slice, way)
                way, inner = [*way, inner.value], inner.value
            if not isinstance(inner, ast.Name):
                walk(inner, way[:-1])
            return
        for child in ast.iter_child_nodes(node):
            walk(child, way)

    for statement in source.tree.body:
        walk(statement, [source.tree])
    return tuple(found)


def _calls_a_local(source: Source) -> bool:
    """Whether a function calls what one of its own variables holds."""
    code = source.function.__code__
    local = {*code.co_varnames, *code.co_cellvars}
    calls = (n.func for n in ast.walk(source.tree) if isinstance(n, ast.Call))
    return any(isinstance(f, ast.Name) and f.id in local for f in calls)


def _may_be_a_module(node: ast.expr, source: Source) -> bool:
    """Whether a name that a function gives to something may stand for a module, and not for a tensor."""
    if not isinstance(node, ast.Name):
        return not isinstance(node, ast.Call | ast.BinOp)
    for one in ast.walk(source.tree):
        if isinstance(one, ast.For | ast.comprehension):
            targets, value = [one.target], None
        elif isinstance(one, ast.Assign):
            targets, value = one.targets, one.value
        else:
            continue
        names = {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
        call = value.func if isinstance(value, ast.Call) else None
        looks = isinstance(call, ast.Name) and call.id in ("getattr", "next")
        if node.id in names and (value is None or looks or isinstance(value, ast.Attribute | ast.Subscript)):
            return True
    return False


def _only_compared(way: list[ast.AST]) -> bool:
    above = way[-2]
    if isinstance(above, ast.Compare):
        return all(isinstance(op, ast.Is | ast.IsNot) for op in above.ops)
    tested = isinstance(above, ast.If | ast.IfExp) and above.test is way[-1]
    return (
        tested
        or isinstance(above, ast.BoolOp)
        or (isinstance(above, ast.UnaryOp) and isinstance(above.op, ast.Not))
    )


def _kept(module: Module) -> Iterator[Module]:
    """The modules that a module's plain attributes hold: in lists, partial functions, methods, closures."""
    queue = [(v, 0) for n, v in vars(module).items() if n not in ("_modules", "_parameters", "_buffers")]
    while queue:
        value, depth = queue.pop()
        if isinstance(value, Module):
            yield value
            continue
        inside: list[Any] = []
        if isinstance(value, list | tuple | set):
            inside = list(value)
        elif isinstance(value, dict):
            inside = list(value.values())
        elif isinstance(value, MethodType):
            inside = [value.__self__]
        elif isinstance(value, functools.partial):
            inside = [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, FunctionType):
            inside = [c.cell_contents for c in value.__closure__ or () if _is_set(c)]
        if depth < 4:
            queue += [(one, depth + 1) for one in inside]


def _is_set(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 (reading an empty cell raises)
    except ValueError:
        return False
    return True
