"""Rewrite the expressions of a method: what may start a waiting call or join one, and all other reads."""

import ast
from collections.abc import Iterable
from typing import Any

from torch.nn import Module

from ..graph.source import live_test
from ..graph.trees import COMPREHENSIONS, SCOPES, called_in, has, load
from .expressions import Expressions
from .joined import Described, Outlook
from .next_use import NextUse
from .pending import BATCH_NORM_FUNCTIONS
from .steps import step_of

CALL, METHOD, ADD, IADD, NOW, HOLD = (
    f"_gammabeta_{name}" for name in ("call", "method", "add", "iadd", "now", "hold")
)


def made_by(helper: str, *args: ast.expr) -> ast.expr:
    """A call of one of the functions of ``pending``."""
    return ast.Call(load(helper), list(args), [])


class Calls:
    """Rewrites expressions and notes what joins which layer; ``live``: whether this code runs, or may run."""

    def __init__(self, code: Expressions, next_use: NextUse) -> None:
        self.code, self.next_use = code, next_use
        self.outlook = Outlook(written=code.written)
        self.live = True

    def expression(
        self,
        node: ast.expr,
        env: dict[str, Described],
        *,
        wait: bool = False,
        passing: Iterable[str] = (),
        why: str = "",
    ) -> tuple[ast.expr, Described | None]:
        """Rewrite an expression.

        Args:
            node: the expression.
            env: what waits in variables.
            wait: whether it may give a ``Pending``.
            passing: variables that may be given to what joins them.
            why: what to say of a call that is not joined further.
        """
        if isinstance(node, ast.Name) and node.id in self.code.waiting and isinstance(node.ctx, ast.Load):
            if wait and node.id in passing:
                return node, env.pop(node.id, None)
            found = env.pop(node.id, None)
            if found is not None:
                self.note(found, why or "its output is used in several places")
            value = ast.NamedExpr(ast.Name(node.id, ast.Store()), made_by(NOW, load(node.id)))
            return ast.copy_location(value, node), None
        if self.code.may_wait(node) and not isinstance(node, ast.Name):
            made, found = self._waiting(node, env, passing)
            ast.copy_location(made, node)
            if wait:
                return made, found
            if found is not None:
                self.note(found, why or "its output is used in several places")
            return ast.copy_location(made_by(NOW, made), node), None
        if isinstance(node, (*SCOPES, *COMPREHENSIONS)):
            return node, None
        return self._plain(node, env), None

    def _plain(self, node: ast.expr, env: dict[str, Described]) -> ast.expr:
        if isinstance(node, ast.Call):
            why = f"followed by {self.code.name_of(node.func)}"
        else:
            why = f"followed by {node.attr}" if isinstance(node, ast.Attribute) else ""
        passing = {n for n in self.code.waiting if self.next_use.read_once(n)}

        def part(value: Any) -> Any:
            if isinstance(value, list):
                return [part(v) for v in value]
            if isinstance(value, ast.expr):
                return self.expression(value, env, passing=passing, why=why)[0]
            if isinstance(value, ast.keyword):
                return ast.keyword(value.arg, part(value.value))
            return value

        made = type(node)(**{name: part(value) for name, value in ast.iter_fields(node)})
        return ast.copy_location(made, node)

    def _waiting(
        self, node: ast.expr, env: dict[str, Described], passing: Iterable[str]
    ) -> tuple[ast.expr, Described | None]:
        """An expression that may give a ``Pending``."""
        if isinstance(node, ast.BinOp):
            return self._sum(node, env, passing)
        if isinstance(node, ast.IfExp):
            test, _ = self.expression(node.test, env)
            body, one = self.expression(node.body, env, wait=True, passing=passing)
            orelse, other = self.expression(node.orelse, env, wait=True, passing=passing)
            taken = live_test(node.test, self.code.module, self.code.names)
            return ast.IfExp(test, body, orelse), one if taken in (True, None) else other
        assert isinstance(node, ast.Call)
        alone = not any(has(a, ast.Call) for a in (*node.args[1:], *node.keywords))
        keywords = [ast.keyword(k.arg, self.expression(k.value, env)[0]) for k in node.keywords]
        if self.code.is_method_call(node):
            assert isinstance(node.func, ast.Attribute)
            value, found = self.expression(node.func.value, env, wait=alone, passing=passing)
            args = [self.expression(a, env)[0] for a in node.args]
            if node.func.attr in ("add", "add_"):
                step: Any = ("residual", True) if len(args) == 1 and not keywords else None
            else:
                step = step_of(node.func.attr, tuple(map(self.code.value, node.args)), {})
            made = ast.Call(load(METHOD), [value, ast.Constant(node.func.attr), *args], keywords)
            return made, self._described(found, step, node.func.attr)
        func, _ = self.expression(node.func, env)
        name = self.code.name_of(node.func)
        step = self.code.step(node)
        join = step is not None
        first, found = self.expression(
            node.args[0], env, wait=alone and join, passing=passing, why=f"followed by {name}"
        )
        rest = [self.expression(a, env)[0] for a in node.args[1:]]
        made = ast.Call(load(CALL), [func, first, *rest], keywords)
        found = self._described(found, step, name)
        callee = self.code.value(node.func)
        joined = found is not None and found.linear is not None and found.layer is callee
        if isinstance(callee, Module) and self.code.is_start(node) and not joined:
            started = self.code.starts(callee)
            found = started.again() if started is not None and not node.keywords and not rest else None
        elif any(callee is function for function in BATCH_NORM_FUNCTIONS):
            found = Described(self.code.module)
            self.outlook.functional = True
        return made, found

    def _sum(
        self, node: ast.BinOp, env: dict[str, Described], passing: Iterable[str]
    ) -> tuple[ast.expr, Described | None]:
        left, one = self.expression(node.left, env, wait=True, passing=passing)
        right, other = self.expression(node.right, env, wait=True, passing=passing)
        if self.code.may_wait(node.left) and has(node.right, ast.Call):
            left = made_by(HOLD, left, ast.Constant(0), *called_in(node.right))
        if one is not None and other is not None:
            self.note(other, "it is added to another batch norm")
        found = one or other
        return made_by(ADD, left, right), self._described(found, ("residual", True), "add")

    def _described(self, found: Described | None, step: Any, name: str) -> Described | None:
        if found is None:
            return None
        if isinstance(step, tuple) and found.joins(step):
            return found
        self.note(
            found, f"followed by {name}" if step is not True else "what follows it is known in a run only"
        )
        return None

    def note(self, found: Described, reason: str) -> None:
        """Say of a layer what has joined it, and why not more."""
        if self.live and found.layer is not None:
            text = str(found)
            known = self.outlook.fused.get(found.layer)
            if known is None or (text and not known[0]):
                self.outlook.fused[found.layer] = (text, reason)
