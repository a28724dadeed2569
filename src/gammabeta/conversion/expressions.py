"""What the expressions of a method are: which may be a waiting call, and which may run while one waits."""

import ast
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.nn import Module

from ..epilogue import ACTIVATIONS
from ..graph.source import UNKNOWN, Names, Source, live_value
from ..graph.trees import COMPREHENSIONS, SCOPES, inside, target
from .joined import Described
from .pending import BATCH_NORM_FUNCTIONS
from .steps import Step, is_plain_function, plain, step_of, step_of_module

#: Says of a module what a call of it starts, or None: a batch norm, or a module that ends in one.
Starts = Callable[[Module], Described | None]
_METHODS = {call for row in ACTIVATIONS.values() for call in row.calls if isinstance(call, str)} | {
    "add",
    "add_",
}
_SEES_LOCALS = {"locals", "vars", "eval", "exec", "_getframe", "globals"}


class Expressions:
    """The expressions of one method of one module, as far as the module's attributes tell.

    Attributes:
        waiting: the local variables that may hold a waiting call.
        hidden: those that inner functions and comprehensions see, or that are not only assigned by ``=``.
        loads: how often each local variable is read.
        written: torch's layers whose tail the method computes.
    """

    def __init__(
        self, module: Module, source: Source, starts: Starts, ending: frozenset[str] = frozenset()
    ) -> None:
        self.module, self.source, self.starts, self.ending = module, source, starts, ending
        self.names = Names.of_method(module, source)
        self.tree = source.tree
        self.written: set[Module] = set()
        self.holds_some = any(starts(child) for child in _near(module))
        self.hidden = self._hidden_names()
        self.loads = {
            name: sum(
                isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load)
                for n in ast.walk(self.tree)
            )
            for name in self.names.local
        }
        self.waiting: set[str] = set()

    def shows_locals(self) -> bool:
        """Whether the method may show its local variables to other code."""
        return any(isinstance(n, ast.Name) and n.id in _SEES_LOCALS for n in ast.walk(self.tree))

    def starts_some(self) -> bool:
        """Whether the method may call a batch norm."""
        return any(isinstance(n, ast.Call) and self.is_start(n) for n in self.nodes())

    def find_waiting(self) -> None:
        """Find the variables that may hold a waiting call, until no more are found."""
        while True:
            before = set(self.waiting)
            for node in self.nodes():
                name = target(node) if isinstance(node, ast.stmt) else None
                if name is not None and name not in self.hidden and self.may_wait(node.value):  # type: ignore[attr-defined]
                    self.waiting.add(name)
            if self.waiting == before:
                break

    def nodes(self) -> Iterator[ast.AST]:
        """Everything in the method but what stands in functions and comprehensions of its own."""
        return inside(self.tree.body, *SCOPES, *COMPREHENSIONS)

    def _hidden_names(self) -> set[str]:
        """Names that inner functions and comprehensions see, or that are not only assigned by ``=``."""
        inner = [
            n for n in ast.walk(self.tree) if isinstance(n, (*SCOPES, *COMPREHENSIONS)) and n is not self.tree
        ]
        hidden = {n.id for one in inner for n in ast.walk(one) if isinstance(n, ast.Name)}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Global | ast.Nonlocal):
                hidden |= set(node.names)
            if isinstance(node, ast.NamedExpr):
                hidden.add(node.target.id)
            if isinstance(node, ast.Delete):
                hidden |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        return hidden

    def value(self, node: ast.expr) -> Any:
        """What an expression is now, or ``UNKNOWN``."""
        return live_value(node, self.module, self.names)

    def is_start(self, node: ast.Call) -> bool:
        """Whether a call may be one of a batch norm."""
        if not node.args or isinstance(node.args[0], ast.Starred):
            return False
        callee = self.value(node.func)
        if isinstance(callee, Module):
            tail = vars(callee).get("_tail")
            if tail is not None and (any(tail) or len(node.args) > 1 or node.keywords):
                self.written.add(callee)
                return True
            return self.starts(callee) is not None
        if callee is UNKNOWN:
            named = isinstance(node.func, ast.Attribute) and node.func.attr in self.ending
            if named and self.value(node.func.value) is self.module:  # type: ignore[attr-defined]
                return True
            held = isinstance(node.func, ast.Name | ast.Subscript | ast.Attribute | ast.Call)
            return self.holds_some and held and not self._is_method(node.func)
        return any(callee is function for function in BATCH_NORM_FUNCTIONS)

    def _is_method(self, func: ast.expr) -> bool:
        """Whether it is a method of a tensor or of the module itself, which starts nothing."""
        if not isinstance(func, ast.Attribute):
            return False
        owner = self.value(func.value)
        if isinstance(owner, Module):
            return callable(getattr(type(owner), func.attr, None))
        return True

    def step(self, node: ast.Call, skip: int = 1) -> Step | bool | None:
        """What a call does to its first argument: a step, None for anything else, True if it is not known."""
        callee = self.value(node.func)
        if callee is UNKNOWN:
            return None if self._is_method(node.func) else True
        args = [self.value(a) for a in node.args[skip:]]
        named = {k.arg: self.value(k.value) for k in node.keywords}
        if any(a is UNKNOWN for a in (*args, *named.values())) or None in named:
            return True if callable(callee) and not isinstance(callee, Module) else None
        if isinstance(callee, Module) and self.starts(callee) is not None:
            step = None if args or named else step_of_module(callee)
            return step if step is not None and step[0] == "norm" else None
        return step_of(callee, tuple(args), named)  # type: ignore[arg-type]

    def is_method_call(self, node: ast.Call) -> bool:
        """Whether it is a call ``x.relu()`` of a method that may join."""
        return (
            isinstance(node.func, ast.Attribute)
            and node.func.attr in _METHODS
            and self.value(node.func.value) is UNKNOWN
        )

    def may_wait(self, node: ast.expr | None) -> bool:
        """Whether an expression may give a waiting call."""
        if isinstance(node, ast.Name):
            return node.id in self.waiting
        if isinstance(node, ast.Call):
            if self.is_start(node):
                return True
            if self.is_method_call(node):
                return self.may_wait(node.func.value)  # type: ignore[attr-defined]
            joins = bool(node.args) and self.may_wait(node.args[0]) and self.step(node) is not None
            return joins and all(map(self.harmless, [node.func, *node.args[1:], *node.keywords]))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            left, right = self.may_wait(node.left), self.may_wait(node.right)
            return (left and (right or self.harmless(node.right))) or (right and self.harmless(node.left))
        if isinstance(node, ast.IfExp):
            return self.may_wait(node.body) or self.may_wait(node.orelse)
        return False

    def harmless(self, node: ast.AST) -> bool:
        """Whether a call may wait while code runs: it takes and names what is known, and calls plain modules.

        All else could read or write what the waiting call is to read or write.
        """
        if isinstance(node, ast.If | ast.IfExp):
            arms = [*node.body, *node.orelse] if isinstance(node, ast.If) else [node.body, node.orelse]
            return self.harmless_test(node.test) and all(map(self.harmless, arms))
        if isinstance(node, ast.Assign):
            return all(isinstance(t, ast.Name) for t in node.targets) and self.harmless(node.value)
        if isinstance(node, ast.Call) and self.value(node.func) is getattr:
            return self.value(node) is not UNKNOWN
        if isinstance(node, ast.Call):
            given = [*node.args, *(k.value for k in node.keywords)]
            return self._harmless_callee(node.func) and all(map(self.harmless, given))
        if isinstance(node, ast.Attribute):
            return self.value(node) is not UNKNOWN or self._is_missing(node)
        if isinstance(node, ast.Subscript):
            return isinstance(node.value, ast.Name) and isinstance(node.slice, ast.Constant)
        if isinstance(node, ast.UnaryOp):
            return isinstance(node.operand, ast.Constant)
        return isinstance(node, ast.Name | ast.Constant | ast.Pass)

    def _is_missing(self, node: ast.Attribute) -> bool:
        """Whether a module has no such attribute, so that to read it runs no code."""
        owner = self.value(node.value)
        plain_class = isinstance(owner, Module) and type(owner).__getattr__ is Module.__getattr__
        return plain_class and not hasattr(type(owner), node.attr)

    def _harmless_callee(self, func: ast.expr) -> bool:
        callee = self.value(func)
        of_a_name = isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name)
        if of_a_name and (callee is None or self._is_missing(func)):  # type: ignore[arg-type]
            return True  # not called as long as it is not there; `hold` looks again
        return plain(callee) if isinstance(callee, Module) else is_plain_function(callee)

    def harmless_test(self, node: ast.expr) -> bool:
        """The same for a condition: of values that are known, or whether a name is None."""
        if isinstance(node, ast.BoolOp):
            return all(map(self.harmless_test, node.values))
        if isinstance(node, ast.UnaryOp):
            return self.harmless_test(node.operand)
        if isinstance(node, ast.Compare):
            same = all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops)
            sides = [node.left, *node.comparators]
            return all((same and self._is_module_or_name(s)) or self._is_plain_value(s) for s in sides)
        return self._is_plain_value(node)

    def _is_module_or_name(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Name) or isinstance(self.value(node), Module)

    def _is_plain_value(self, node: ast.expr) -> bool:
        return isinstance(self.value(node), bool | int | float | str | None)

    def has_plain_code(self) -> bool:
        """Whether the whole method is of that kind."""
        for node in self.tree.body:
            text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            ends = isinstance(node, ast.Return) and node.value is not None and self.harmless(node.value)
            if not (text or ends or self.harmless(node)):
                return False
        return True

    def name_of(self, func: ast.expr) -> str:
        """What is called, for a report."""
        callee = self.value(func)
        if isinstance(callee, Module):
            return str(getattr(type(callee), "_base", type(callee)).__name__)
        return func.attr if isinstance(func, ast.Attribute) else ast.unparse(func)


def _near(module: Module) -> Iterator[Module]:
    """The modules that a method may reach by an index or a loop: its children, and what these list."""
    for child in module.children():
        yield child
        if isinstance(child, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            yield from _near(child)
    for value in vars(module).values():
        if isinstance(value, list | tuple):
            yield from (v for v in value if isinstance(v, Module))
