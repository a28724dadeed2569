"""What a method does with a value: whether each run does with it what the one run that was seen did.

A run shows the calls of one path. Here the source is asked whether there is another: a branch, a function of
the model's own, a variable that is read again later.
"""

import ast
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Module

from .reach import is_torchs_name, methods_of, of_torch
from .source import UNKNOWN, Names, NotReadable, Source, callee, live_value, read
from .trees import COMPREHENSIONS, SCOPES, inside

_CONDITIONAL = (ast.IfExp, ast.BoolOp, ast.Lambda, *COMPREHENSIONS)
_BRANCHES = (ast.If, ast.IfExp, ast.While, ast.Try, ast.Match)
_LEAVES = (ast.Return, ast.Break, ast.Continue, ast.Raise, ast.Yield, ast.YieldFrom, ast.Await)
_LOOPS = (ast.For, ast.While, ast.Try)
_SIMPLE = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr)
# What is asked of a tensor beside its values.
_FORM = {"shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "size", "dim", "numel"}
_ASKED = {"len", "isinstance", "type"}
_LIKE = {"reshape_as", "view_as", "expand_as", "type_as"}
_COMPUTES = {"forward", "_conv_forward", "_check_input_dim"}  # what a layer of torch's does with its input
_OPERATIONS = {nn.functional.batch_norm, torch.batch_norm, nn.functional.linear} | {
    getattr(nn.functional, f"conv{kind}{n}d") for kind in ("", "_transpose") for n in (1, 2, 3)
}

# --- single modules ---------------------------------------------------------------------------------------


def is_called_as_module(module: Module) -> bool:
    """Whether a call of it runs its class's ``forward`` and nothing else, hooks apart."""
    own = type(module).__call__ is Module.__call__ and "forward" not in vars(module)
    return own and not isinstance(module, torch.jit.ScriptModule)


def is_plain(module: Module) -> bool:
    """Whether it is a layer of torch's or ours, or computes as one does: it does the same at each call."""
    kind = type(module)
    own = any(name in _COMPUTES for name, _ in methods_of(kind))
    return is_called_as_module(module) and not own and is_torchs_name(kind.forward.__module__)


def is_steady(module: Module) -> bool:
    """Whether a module, and all in it, does the same at each call."""
    return all(is_plain(m) or not branch_in(m) for m in module.modules())


def branch_in(module: Module) -> str:
    """Why a module may do something else at another call: a branch in its forward or in what that calls."""
    kind = type(module)
    if not is_called_as_module(module):
        return f"{kind.__name__} is not called as other modules are"
    return _branch_in_function(module, kind.forward, set())


def _branch_in_function(module: Module, function: Any, seen: set[Any]) -> str:
    name = type(module).__name__
    if function in seen or (seen and of_torch(function)):
        return ""
    seen.add(function)
    try:
        source = read(function)
    except NotReadable as error:
        return f"the code of {name} cannot be read ({error})"
    method = Method(module, source)
    for node in ast.walk(source.tree):
        why = f"a branch in {name} may part them" if isinstance(node, _BRANCHES) else ""
        if isinstance(node, ast.Call):
            why = _branch_in_call(method, node, seen)
        if why:
            return why
    return ""


def _branch_in_call(method: "Method", call: ast.Call, seen: set[Any]) -> str:
    target = method.callee(call)
    if isinstance(target, FunctionType):
        return _branch_in_function(method.module, target, seen)
    if isinstance(target, Module):
        return "" if is_steady(target) else f"a branch in {type(target).__name__} may part them"
    unknown = target is UNKNOWN and isinstance(call.func, ast.Name)
    return f"{type(method.module).__name__} calls what is not known" if unknown else ""


def unlike(module: Module, *, gives: bool) -> str:
    """Why a forward may not end (or not begin) with its one operation, a convolution or batch norm."""
    if is_plain(module):
        return ""
    kind = type(module)
    if not is_called_as_module(module):
        return f"{kind.__name__} is not called as other modules are"
    return _operates(module, kind.forward, gives=gives, depth=0) and branch_in(module)


def _operates(module: Module, function: Any, *, gives: bool, depth: int) -> str:
    """Why a function may not give what the operation in it gives, or not hand it its first argument."""
    try:
        source = read(function)
    except NotReadable as why:
        return f"the code of {type(module).__name__} cannot be read ({why})"
    method = Method(module, source)
    found = []
    for node in (n for n in ast.walk(source.tree) if isinstance(n, ast.Call)):
        target = method.callee(node)
        if not isinstance(target, FunctionType):
            if callable(target) and not isinstance(target, Module) and target in _OPERATIONS:
                found.append(node)
            continue
        layers = target.__name__ in _COMPUTES and is_torchs_name(target.__module__)  # super().forward
        known = layers or target in _OPERATIONS
        inner = not known and not of_torch(target) and depth < 3
        if known or (inner and not _operates(module, target, gives=gives, depth=depth + 1)):
            found.append(node)
    if len(found) != 1:
        return f"{type(module).__name__} may do something else at another call"
    return method.gives(found[0]) if gives else method.takes(found[0], bound=depth == 0)


# --- what a method does with a value ----------------------------------------------------------------------


class Method:
    """A method, seen from its module."""

    def __init__(self, module: Module, source: Source) -> None:
        self.module, self.source = module, source
        self.names = Names.of_method(module, source)
        self._flats: dict[int, list[ast.stmt]] = {}
        self.above: dict[ast.AST, ast.AST] = {
            child: node for node in ast.walk(source.tree) for child in ast.iter_child_nodes(node)
        }

    def callee(self, call: ast.Call) -> Any:
        """What is called: a module, a function, or ``UNKNOWN``."""
        func = call.func
        if isinstance(func, ast.Attribute) and func.attr == "forward":
            owner = live_value(func.value, self.module, self.names)
            if isinstance(owner, Module):
                return owner
        return callee(func, self.module, self.names)

    # The three questions

    def carries(self, one: ast.AST, other: ast.AST, *, strict: bool) -> str:
        """Why what the call ``one`` gives may not go into the call ``other``, or go elsewhere too.

        ``strict``: nothing may stand between, as no run has shown what does.
        """
        start, end = self._place(one), self._place(other)
        if start is None or end is None:
            return "one of them is called on a condition"
        (block, i), (other_block, j) = start, end
        if block is not other_block:
            return "a branch may part them"
        if i > j:
            return "they are called in another order"
        if i == j:
            return self._way(other, one, strict) or _kept_beside(block[i])
        return self._first(block[i], one, strict) or self._follow(block, (i, j), other, strict)

    def gives(self, call: ast.AST) -> str:
        """Why the method may not return what the call gives."""
        body = self._flat(self.source.tree.body)
        name, end = type(self.module).__name__, body[-1]
        ends = [n for n in self._inside() if isinstance(n, _LEAVES) and n is not end]
        if ends or not isinstance(end, ast.Return):
            return f"a branch in {name} may end it earlier"
        place = self._place(call)
        if place is None or place[0] is not body:
            return f"{name} calls it on a condition"
        i, j = place[1], len(body) - 1
        if i == j:
            return self._way(end, call, False)
        return self._first(body[i], call, False) or self._follow(body, (i, j), end, False)

    def takes(self, call: ast.AST, *, bound: bool = True) -> str:
        """Why the call may not be given the first argument; ``bound``: behind ``self``."""
        arguments = self.source.tree.args
        given = [*arguments.posonlyargs, *arguments.args][int(bound) :]
        place = self._place(call)
        if not given or place is None or place[0] is not self._flat(self.source.tree.body):
            return f"{type(self.module).__name__} calls it on a condition"
        return self._follow(place[0], (-1, place[1]), call, False, {given[0].arg})

    # Places

    def _inside(self) -> Iterator[ast.AST]:
        """The nodes of the method, without those of functions in it."""
        return inside(self.source.tree.body, *SCOPES)

    def _place(self, node: ast.AST) -> tuple[list[ast.stmt], int] | None:
        """The block that a call stands in, and where; None if it may not be evaluated with its statement."""
        inner = node
        while not isinstance(inner, ast.stmt):
            inner = self.above[inner]
            if isinstance(inner, _CONDITIONAL):
                return None
        if not isinstance(inner, _SIMPLE):
            return None
        block, outer = self._block_of(inner), self.above[inner]
        while isinstance(outer, ast.If) and block is outer.body and self._asks_for_a_child(outer):
            block, outer = self._block_of(outer), self.above[outer]
        flat = self._flat(block)
        return flat, next(k for k, statement in enumerate(flat) if statement is inner)

    def _block_of(self, statement: ast.stmt) -> list[ast.stmt]:
        """The list of statements that a statement is in."""
        fields = [value for _, value in ast.iter_fields(self.above[statement]) if isinstance(value, list)]
        return next(value for value in fields if any(one is statement for one in value))

    def _flat(self, block: list[ast.stmt]) -> list[ast.stmt]:
        """The statements of a block, those within an ``if`` that only asks for a child that there is too."""
        if id(block) not in self._flats:
            found: list[ast.stmt] = []
            for one in block:
                opened = isinstance(one, ast.If) and self._asks_for_a_child(one)
                found += self._flat(one.body) if isinstance(one, ast.If) and opened else [one]
            self._flats[id(block)] = found
        return self._flats[id(block)]

    def _asks_for_a_child(self, statement: ast.If) -> bool:
        """Whether the test is ``self.bn is not None``, and it is not."""
        test = statement.test
        if not isinstance(test, ast.Compare) or len(test.ops) > 1 or not isinstance(test.ops[0], ast.IsNot):
            return False
        none = test.comparators[0]
        asks = isinstance(none, ast.Constant) and none.value is None
        return asks and isinstance(live_value(test.left, self.module, self.names), Module)

    # Following a value

    def _way(self, root: ast.AST, leaf: ast.AST, strict: bool) -> str:
        """Why a value may not come from ``leaf`` up to ``root`` at each run as in the one that was seen."""
        inner, node = leaf, self.above[leaf]
        while node is not root:
            why = "it goes another way" if isinstance(node, ast.stmt) else self._stops(node, inner, strict)
            if why:
                return why
            inner, node = node, self.above[node]
        return ""

    def _stops(self, node: ast.AST, inner: ast.AST, strict: bool) -> str:
        """Why a node may do something else at another run with what ``inner``, in it, stands for."""
        other = "other code between them may change what passes"
        if isinstance(node, ast.keyword):
            return ""
        if isinstance(node, ast.Call):
            target = self.callee(node)
            if isinstance(target, Module):
                steady = isinstance(target, nn.Identity) if strict else is_steady(target)
                return "" if steady else f"{type(target).__name__} stands between, and may do something else"
            method = node.func is inner and isinstance(inner, ast.Attribute) and hasattr(Tensor, inner.attr)
            known = (target is UNKNOWN and method) or (target is not UNKNOWN and of_torch(target))
            return "" if known and not strict else other
        part = isinstance(node, ast.Attribute | ast.Subscript) and node.value is inner
        seen = part or isinstance(node, ast.BinOp | ast.UnaryOp | ast.Compare)
        return "" if seen and not strict else other

    def _first(self, statement: ast.stmt, call: ast.AST, strict: bool) -> str:
        """Why what the call gives may not go into the variables of its statement alone."""
        if not _stored(statement):
            return "its output is kept where other code may read it"
        return _kept_beside(statement) or self._way(statement, call, strict)

    def _follow(
        self,
        block: list[ast.stmt],
        span: tuple[int, int],
        end: ast.AST,
        strict: bool,
        given: set[str] | None = None,
    ) -> str:
        """Follow variables to ``end``, a call or a return in the last statement of ``span``.

        They are those that the first statement stores, or the arguments ``given``.
        """
        i, j = span
        held = set(given or _stored(block[i]))
        code = self.source.function.__code__
        for statement in block[i + 1 : j]:
            why = self._between(statement, held, strict)
            if why:
                return why
            if self._loads(statement, held):
                held |= _stored(statement)
            else:
                held -= _stored(statement)
        if held & {*code.co_cellvars} or not held <= {*code.co_varnames}:
            return "an inner function may read what goes from one to the other"
        loads = self._loads(block[j], held)
        if not loads or not all(self._lies_in(load, end) for load in loads):
            return "what goes from one to the other is also read elsewhere"
        ways = [self._way(end, load, strict) for load in loads]
        why = next(filter(None, ways), "") or _kept_beside(block[j])
        return why or self._read_later(block, i, j, held)

    def _between(self, statement: ast.stmt, held: set[str], strict: bool) -> str:
        """Why a statement may change what the variables hold, or show it, at another run."""
        if any(isinstance(n, _LEAVES) for n in ast.walk(statement)):
            return "the method may end between them"
        loads = self._loads(statement, held)
        if any(isinstance(n, ast.stmt) for n in ast.walk(statement) if n is not statement):
            stores = {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and not _is_load(n)}
            changes = bool(loads) or bool(stores & held)
            return "a branch between them may change what goes from one to the other" if changes else ""
        if not loads or isinstance(statement, ast.Assert):
            return ""
        if not _stored(statement):
            return "other code between them reads what passes"
        ways = (self._way(statement, load, strict) for load in loads if load in self.above)
        return _kept_beside(statement) or next(filter(None, ways), "")

    def _loads(self, statement: ast.AST, names: set[str]) -> list[ast.Name]:
        """Where a statement reads the values of variables, and not only their form."""
        found = []
        for node in ast.walk(statement):
            added = node.target if isinstance(node, ast.AugAssign) else None
            if isinstance(node, ast.Name) and _is_load(node) and not self._form(node):
                found.append(node)
            elif isinstance(added, ast.Name):
                found.append(added)
        return [node for node in found if node.id in names]

    def _form(self, node: ast.Name) -> bool:
        above = self.above[node]
        if isinstance(above, ast.Attribute):
            return above.attr in _FORM
        if isinstance(above, ast.Compare):
            return all(isinstance(op, ast.Is | ast.IsNot) for op in above.ops)
        if not isinstance(above, ast.Call) or node not in above.args:
            return False
        if isinstance(above.func, ast.Attribute):
            return above.func.attr in _LIKE
        return isinstance(above.func, ast.Name) and above.func.id in _ASKED

    def _lies_in(self, node: ast.AST, outer: ast.AST) -> bool:
        while node is not outer and node in self.above:
            node = self.above[node]
        return node is outer

    def _read_later(self, block: list[ast.stmt], i: int, j: int, held: set[str]) -> str:
        """Whether the variables may be read after statement ``j``, which is then not the only reader."""
        around: list[ast.AST] = [block[j]]
        while around[-1] in self.above:
            around.append(self.above[around[-1]])
        again = any(isinstance(node, _LOOPS) for node in around)
        if isinstance(block[j], ast.Return) and not again:
            return ""
        rest = held - _stored(block[j])
        looked_at = {n for statement in block[max(i, 0) : j + 1] for n in ast.walk(statement)}
        for node in self._loads(self.source.tree, rest):
            if node not in looked_at and (again or node.lineno >= block[j].lineno):
                return "what goes from one to the other may also be read later"
        return ""


def _kept_beside(statement: ast.stmt) -> str:
    """Whether a statement keeps a part of its value in another variable."""
    keeps = any(isinstance(n, ast.NamedExpr) for n in ast.walk(statement))
    return "its output is kept beside" if keeps else ""


def _is_load(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Load)


def _stored(statement: ast.stmt) -> set[str]:
    """The variables that a statement assigns, if it assigns nothing else."""
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign | ast.AugAssign):
        targets = [statement.target]
    else:
        return set()
    names = {t.id for t in targets if isinstance(t, ast.Name)}
    return names if all(isinstance(t, ast.Name) for t in targets) else set()
