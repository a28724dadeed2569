"""The source of a function as a syntax tree, and a function made from such a tree.

A forward is rewritten by changing a few calls in its own source. Everything else in it, branches and side
effects included, stays what it was. The new function shares the globals and the closure of the old one.
"""

import __future__

import ast
import builtins
import copy
import inspect
import linecache
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import CellType, CodeType, FunctionType
from typing import Any

import torch
from torch import nn

_FUTURE = 0
for _name in __future__.all_feature_names:
    _FUTURE |= getattr(__future__, _name).compiler_flag & ~0x10  # 0x10: CO_NESTED, of an old feature
_OUTER, _INNER = "_gammabeta_outer", "_gammabeta_inner"

#: What the live value of an expression is when it cannot be told without running it.
UNKNOWN = object()


class NotReadable(Exception):  # noqa: N818 - not an error: a finding
    """Why the source of a function cannot be used."""


@dataclass(frozen=True)
class Source:
    """A function and its syntax tree, of which it is certain that it is what runs."""

    function: FunctionType
    tree: ast.FunctionDef

    @property
    def free(self) -> dict[str, Any]:
        """The values of its closure that are set, by name."""
        found = {}
        for name, cell in zip(
            self.function.__code__.co_freevars, self.function.__closure__ or (), strict=True
        ):
            try:
                found[name] = cell.cell_contents
            except ValueError:  # not set yet
                continue
        return found


_READ: dict[CodeType, Source | str] = {}


def read(function: Any) -> Source:
    """The source of a function.

    Raises:
        NotReadable: it is no plain function, there is no source, or the source is not what runs.
    """
    if not isinstance(function, FunctionType):
        raise NotReadable("it is not a plain Python function")
    found = _READ.get(function.__code__)
    if found is None or (isinstance(found, Source) and found.function is not function):
        try:
            found = _read(function)
        except NotReadable as why:
            found = str(why)
        _READ[function.__code__] = found
    if isinstance(found, str):
        raise NotReadable(found)
    return found


def _read(function: FunctionType) -> Source:
    code = function.__code__
    if hasattr(function, "__wrapped__"):
        raise NotReadable("it is decorated")
    if code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
        raise NotReadable("it is a generator or a coroutine")
    tree = copy.deepcopy(_tree(function))
    owner = function.__qualname__.split(".")[-2:-1]
    _Mangle(owner[0].lstrip("_") if owner and owner[0] != "<locals>" else "").visit(tree)
    tree.decorator_list = []
    return Source(function, tree)


def tree_of(function: FunctionType) -> ast.FunctionDef | None:
    """The syntax tree of a function's own code, decorated or not, to be read only; None if not at hand."""
    try:
        return _tree(function)
    except NotReadable:
        return None


def _tree(function: FunctionType) -> ast.FunctionDef:
    code = function.__code__
    try:
        codes, trees = _file(
            "".join(linecache.getlines(code.co_filename, function.__globals__)), code.co_filename
        )
    except (SyntaxError, ValueError) as error:
        raise NotReadable("its source cannot be read") from error
    place = code.co_firstlineno, code.co_name
    if place not in codes or place not in trees or not _same_code(codes[place], code):
        raise NotReadable("its source is not at hand, or is not what runs")
    return trees[place]


_Place = tuple[int, str]  # the first line of a definition, and its name


@lru_cache(maxsize=64)
def _file(text: str, name: str) -> tuple[dict[_Place, CodeType], dict[_Place, ast.FunctionDef]]:
    """All functions that a file defines: what they are compiled to, and their syntax trees."""
    module = ast.parse(text, name)
    codes: dict[_Place, CodeType] = {}
    waiting = [compile(module, name, "exec", dont_inherit=True)]
    while waiting:
        inside = [c for c in waiting.pop().co_consts if isinstance(c, CodeType)]
        codes |= {(c.co_firstlineno, c.co_name): c for c in inside}
        waiting += inside
    trees = {
        (min([node.lineno, *(d.lineno for d in node.decorator_list)]), node.name): node
        for node in ast.walk(module)
        if isinstance(node, ast.FunctionDef)
    }
    return codes, trees


class _Mangle(ast.NodeTransformer):
    """Private names, as the compiler writes them inside a class."""

    def __init__(self, owner: str) -> None:
        self.owner = owner

    def _mangled(self, name: str) -> str:
        private = self.owner and name.startswith("__") and not name.endswith("__")
        return f"_{self.owner}{name}" if private else name

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        node.attr = self._mangled(node.attr)
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        node.id = self._mangled(node.id)
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return node


def _same_code(one: CodeType, other: CodeType) -> bool:
    """Whether two code objects do the same; where they stand in a file does not matter."""
    if _form(one) != _form(other) or len(one.co_consts) != len(other.co_consts):
        return False
    for a, b in zip(one.co_consts, other.co_consts, strict=True):
        if isinstance(a, CodeType) and isinstance(b, CodeType):
            if not _same_code(a, b):
                return False
        elif type(a) is not type(b) or repr(a) != repr(b):
            return False
    return True


def _form(code: CodeType) -> tuple[Any, ...]:
    names = (code.co_names, code.co_varnames, code.co_cellvars, code.co_freevars)
    return code.co_code, names, code.co_argcount, code.co_kwonlyargcount, code.co_flags


def build(source: Source, tree: ast.FunctionDef, helpers: Mapping[str, Any]) -> FunctionType:
    """A function from a changed tree: with the globals, closure and defaults of the source's.

    ``helpers`` are values that the new code finds under these names, besides.
    """
    function = source.function
    old = function.__code__
    free = [*old.co_freevars, *helpers]
    inner = ast.FunctionDef(_INNER, _without_defaults(tree.args), tree.body, [], None)
    given = ast.arguments([], [ast.arg(name) for name in free], None, [], [], None, [])
    outer = ast.FunctionDef(_OUTER, given, [inner, ast.Return(ast.Name(_INNER, ast.Load()))], [], None)
    for node in (inner, outer):
        ast.copy_location(node, tree)
        if "type_params" in ast.FunctionDef._fields:
            node.type_params = []  # type: ignore[attr-defined]
    module = ast.fix_missing_locations(ast.Module([outer], []))
    whole = compile(module, old.co_filename, "exec", flags=old.co_flags & _FUTURE, dont_inherit=True)
    code = _nested(_nested(whole, _OUTER), _INNER)
    code = code.replace(co_name=old.co_name, co_qualname=old.co_qualname, co_firstlineno=old.co_firstlineno)
    cells = dict(zip(old.co_freevars, function.__closure__ or (), strict=True))
    cells |= {name: CellType(value) for name, value in helpers.items()}
    made = FunctionType(
        code,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        tuple(cells[name] for name in code.co_freevars),
    )
    made.__kwdefaults__ = function.__kwdefaults__
    made.__annotations__ = function.__annotations__
    made.__qualname__, made.__doc__, made.__module__ = (
        function.__qualname__,
        function.__doc__,
        function.__module__,
    )
    vars(made).update(vars(function))
    return made


def _without_defaults(args: ast.arguments) -> ast.arguments:
    """The same parameters; defaults and annotations are taken from the function that there is."""

    def bare(names: list[ast.arg]) -> list[ast.arg]:
        return [ast.arg(a.arg) for a in names]

    optional = ast.Constant(None)
    return ast.arguments(
        bare(args.posonlyargs),
        bare(args.args),
        ast.arg(args.vararg.arg) if args.vararg else None,
        bare(args.kwonlyargs),
        [optional if default is not None else None for default in args.kw_defaults],
        ast.arg(args.kwarg.arg) if args.kwarg else None,
        [optional for _ in args.defaults],
    )


def _nested(code: CodeType, name: str) -> CodeType:
    found: CodeType = next(c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == name)
    return found


# --- what an expression stands for on a live module -------------------------------------------------------


class Names(Mapping[str, Any]):
    """The values of a function's names that it does not assign itself; ``bound``: those of its parameters."""

    def __init__(self, source: Source, bound: Mapping[str, Any]) -> None:
        code = source.function.__code__
        self.local = {*code.co_varnames, *code.co_cellvars}
        self.bound = bound
        self.known = {**source.free, **bound}
        self.globals = source.function.__globals__

    @classmethod
    def of_method(cls, module: nn.Module, source: Source) -> "Names":
        """Those of a method of ``module``."""
        code = source.function.__code__
        return cls(source, {code.co_varnames[0]: module} if code.co_argcount else {})

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


def live_value(node: ast.expr, module: nn.Module, names: Mapping[str, Any]) -> Any:
    """What ``self.a.b``, ``self.a[0]``, ``F.relu`` and constants are now, or ``UNKNOWN``; runs no code.

    ``names``: the values of names, ``self`` among them.
    """
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return names.get(node.id, UNKNOWN)
    if isinstance(node, ast.Attribute):
        return _attribute(live_value(node.value, module, names), node.attr)
    if isinstance(node, ast.Subscript):
        return _item(live_value(node.value, module, names), live_value(node.slice, module, names))
    if isinstance(node, ast.Call) and looks_up(node) and len(node.args) in (2, 3):
        owner, name = (live_value(a, module, names) for a in node.args[:2])
        default = live_value(node.args[2], module, names) if len(node.args) == 3 else UNKNOWN
        if not (isinstance(owner, nn.Module) and isinstance(name, str)):
            return UNKNOWN
        missing = not hasattr(type(owner), name) and type(owner).__getattr__ is nn.Module.__getattr__
        found = _attribute(owner, name)
        return default if found is UNKNOWN and missing else found
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = live_value(node.operand, module, names)
        return -value if isinstance(value, int | float) else UNKNOWN
    return UNKNOWN


def looks_up(node: ast.AST) -> bool:
    """Whether an expression is a call of ``getattr``."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr"


def callee(node: ast.expr, module: nn.Module, names: Names) -> Any:
    """What a call's ``func`` stands for, also if it is a method of a module or of ``super()``."""
    found = live_value(node, module, names)
    if found is not UNKNOWN or not isinstance(node, ast.Attribute):
        return found
    if isinstance(node.value, ast.Call) and live_value(node.value.func, module, names) is super:
        of = names.get("__class__")
        return getattr(super(of, type(module)), node.attr, UNKNOWN) if isinstance(of, type) else UNKNOWN
    owner = live_value(node.value, module, names)
    if isinstance(owner, nn.Module) and node.attr not in vars(owner):
        return inspect.getattr_static(type(owner), node.attr, UNKNOWN)
    return UNKNOWN


def _attribute(owner: Any, name: str) -> Any:
    if owner is UNKNOWN:
        return UNKNOWN
    if isinstance(owner, nn.Module):
        for held in (
            vars(owner),
            *(vars(owner).get(kind, {}) for kind in ("_parameters", "_buffers", "_modules")),
        ):
            if name in held:
                return held[name]
        found = inspect.getattr_static(type(owner), name, UNKNOWN)
        plain = isinstance(found, bool | int | float | str | tuple | type(None))
        return found if plain else UNKNOWN
    if isinstance(owner, type(torch)) or owner is torch.Tensor:
        return getattr(owner, name, UNKNOWN)
    return UNKNOWN


def _item(owner: Any, key: Any) -> Any:
    if type(owner) not in _HOLDERS or not isinstance(key, int | str):
        return UNKNOWN
    try:
        return owner[key]
    except (IndexError, KeyError, TypeError):
        return UNKNOWN


_HOLDERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, list, tuple, dict)


def live_test(node: ast.expr, module: nn.Module, names: Mapping[str, Any]) -> bool | None:
    """What a condition made of such values is now, or None if it cannot be told."""
    if isinstance(node, ast.BoolOp):
        parts = [live_test(value, module, names) for value in node.values]
        decisive = isinstance(node.op, ast.Or)
        if decisive in parts:
            return decisive
        return None if None in parts else not decisive
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        part = live_test(node.operand, module, names)
        return None if part is None else not part
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        one, other = (live_value(n, module, names) for n in (node.left, node.comparators[0]))
        return _compared(node.ops[0], one, other)
    value = live_value(node, module, names)
    if value is UNKNOWN or isinstance(value, torch.Tensor):
        return None
    if isinstance(value, nn.Module) and not isinstance(value, nn.ModuleList | nn.ModuleDict | nn.Sequential):
        return True
    return (
        bool(value)
        if isinstance(value, bool | int | float | str | tuple | list | dict | nn.Module | None)
        else None
    )


def _compared(op: ast.cmpop, one: Any, other: Any) -> bool | None:
    if one is UNKNOWN or other is UNKNOWN:
        return None
    if isinstance(op, ast.Is | ast.IsNot):
        return (one is other) == isinstance(op, ast.Is)
    plain = isinstance(one, bool | int | float | str | None) and isinstance(
        other, bool | int | float | str | None
    )
    if isinstance(op, ast.Eq | ast.NotEq) and plain:
        return bool(one == other) == isinstance(op, ast.Eq)
    return None
