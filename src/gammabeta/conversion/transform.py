"""Rewrite the statements of a method so that what follows a batch norm may join its pass.

Only a few expressions change: ``self.bn(x)`` becomes ``call(self.bn, x)``, which may give a ``Pending``; an
addition or a call that may join it is made through ``add`` and ``call`` too. A local variable that may hold a
``Pending`` is read through ``now`` everywhere else. Where other code runs in between, ``hold`` keeps it only
if nothing can change its input meanwhile. All else in the method stays as it is written.

The same walk describes what will join which layer, as far as the module's attributes tell: for the report.
"""

import ast
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn import Module

from ..graph.source import Source, live_test
from ..graph.trees import SCOPES, assign, has, load, mentions, target
from .calls import HOLD, IADD, NOW, Calls, made_by
from .expressions import Expressions, Starts
from .joined import Described, Outlook
from .next_use import NextUse

_LISTS = (nn.ModuleList, nn.Sequential, list, tuple, int)


def rewrite(
    module: Module, source: Source, starts: Starts, ending: frozenset[str] = frozenset()
) -> tuple[ast.FunctionDef, Outlook] | None:
    """The method as a new tree, and what it will do; None if it calls no batch norm, or shows its locals.

    ``ending``: other methods of the module that may end in a waiting call.
    """
    code = Expressions(module, source, starts, ending)
    if code.shows_locals() or not code.starts_some():
        return None
    code.find_waiting()
    rewriting = _Rewriting(code)
    body = rewriting.block(code.tree.body, [], {})
    tree = ast.FunctionDef(code.tree.name, code.tree.args, body, [], None)
    return ast.copy_location(tree, code.tree), rewriting.calls.outlook


def has_plain_code(module: Module, source: Source) -> bool:
    """Whether a forward only names and passes on what it is given, and calls plain modules and functions."""
    return Expressions(module, source, lambda _: None).has_plain_code()


class _Rewriting:
    def __init__(self, code: Expressions) -> None:
        self.code, self.next_use = code, NextUse(code)
        self.calls = Calls(code, self.next_use)

    def _hold(self, name: str, rest: Sequence[ast.stmt], known: int = 0) -> ast.expr:
        """``hold(name, known, what is called until the variable is read)``."""
        return made_by(HOLD, load(name), ast.Constant(known), *self.next_use.called(name, rest))

    def block(
        self, statements: Sequence[ast.stmt], after: Sequence[ast.stmt], env: dict[str, Described]
    ) -> list[ast.stmt]:
        """Rewrite statements; ``after`` are those that follow in the lists around, ``env`` what waits."""
        made: list[ast.stmt] = []
        for i, statement in enumerate(statements):
            made += self.statement(statement, [*statements[i + 1 :], *after], env)
        return made

    def statement(
        self, node: ast.stmt, rest: Sequence[ast.stmt], env: dict[str, Described]
    ) -> list[ast.stmt]:
        name = target(node)
        if isinstance(node, ast.AugAssign):
            if name in self.code.waiting and isinstance(node.op, ast.Add):
                return self._augmented(node, str(name), rest, env)
            value, _ = self.calls.expression(node.value, env)
            first = [self._settled(str(name), node, env)] if name in self.code.waiting else []
            return [*first, ast.copy_location(ast.AugAssign(node.target, node.op, value), node)]
        if name is not None and name in self.code.waiting and self.code.may_wait(node.value):  # type: ignore[attr-defined]
            return self._waits(node, name, rest, env)
        if isinstance(node, ast.Return) and node.value is not None:
            waits = not self.next_use.guarded and self.code.may_wait(node.value)
            value, found = self.calls.expression(node.value, env, wait=waits, passing=self.code.waiting)
            self.calls.outlook.returns_waiting |= waits
            if found is not None and self.calls.live:
                self.calls.outlook.returned = found
                self.calls.note(found, "its output leaves the module")
            return [ast.copy_location(ast.Return(value), node)]
        if isinstance(node, ast.If):
            return self._branches(node, rest, env)
        if isinstance(node, ast.For | ast.While):
            return self._loop(node, env)
        made = self._other(node, env)  # may say what a variable that waits is followed by
        if name is not None:
            env.pop(name, None)
        return [made]

    def _waits(
        self, node: Any, name: str, rest: Sequence[ast.stmt], env: dict[str, Described]
    ) -> list[ast.stmt]:
        """An assignment of what may be a waiting call."""
        once = mentions(node.value, name) == 1
        passing = {name} if once else set()
        for n in self.code.waiting:
            ends = mentions(node.value, n) == 1 and self.next_use.is_dead(n, rest)
            if ends or self.next_use.read_once(n):
                passing.add(n)
        link = self.next_use.link(rest, name)
        why = "" if link else self.next_use.reason(rest, name)
        value, found = self.calls.expression(node.value, env, wait=bool(link), passing=passing, why=why)
        made = [assign(name, value, node)]
        if link == "later":
            made.append(assign(name, self._hold(name, rest, self.next_use.own_names(node.value, name)), node))
        env.pop(name, None)
        if link and found is not None:
            env[name] = found
        return made

    def _augmented(
        self, node: ast.AugAssign, name: str, rest: Sequence[ast.stmt], env: dict[str, Described]
    ) -> list[ast.stmt]:
        value, other = self.calls.expression(
            node.value, env, wait=not mentions(node.value, name), why="followed by add"
        )
        if other is not None:
            self.calls.note(other, "it is added to another batch norm")
        found = env.pop(name, None)
        if found is not None and not found.joins(("residual", True)):
            self.calls.note(found, "followed by add")
            found = None
        first: list[ast.stmt] = []
        if has(node.value, ast.Call):
            first = [assign(name, self._hold(name, [node]), node)]
        link = self.next_use.link(rest, name)
        made = made_by(IADD, load(name), value)
        if link:
            if found is not None:
                env[name] = found
        else:
            made = made_by(NOW, made)
            if found is not None:
                self.calls.note(found, self.next_use.reason(rest, name))
        tail = [assign(name, self._hold(name, rest), node)] if link == "later" else []
        return [*first, assign(name, made, node), *tail]

    def _settled(self, name: str, node: ast.AST, env: dict[str, Described]) -> ast.stmt:
        """``name = now(name)``."""
        found = env.pop(name, None)
        if found is not None:
            self.calls.note(found, "its output is used in several places")
        return assign(name, made_by(NOW, load(name)), node)

    def _branches(self, node: ast.If, rest: Sequence[ast.stmt], env: dict[str, Described]) -> list[ast.stmt]:
        test, _ = self.calls.expression(node.test, env)
        taken = live_test(node.test, self.code.module, self.code.names)
        ends: list[dict[str, Described]] = []
        arms: list[list[ast.stmt]] = []
        was = self.calls.live
        for arm, holds in ((node.body, True), (node.orelse, False)):
            self.calls.live = was and taken in (None, holds)
            end = {n: d if taken is holds else d.again() for n, d in env.items()}
            arms.append(self.block(arm, rest, end))
            if taken in (None, holds):
                ends.append(end)
        self.calls.live = was
        env.clear()
        env.update(ends[-1])
        made: list[ast.stmt] = [ast.copy_location(ast.If(test, arms[0] or [ast.Pass()], arms[1]), node)]
        touched = {n for n in self.code.waiting if mentions([*node.body, *node.orelse], n)}
        for name in sorted(touched):
            link = self.next_use.link(rest, name)
            if not link:
                made.append(assign(name, made_by(NOW, load(name)), node) if self._bound(name) else ast.Pass())
                found = env.pop(name, None)
                if found is not None:
                    self.calls.note(found, self.next_use.reason(rest, name))
            elif link == "later" and self._bound(name):
                made.append(assign(name, self._hold(name, rest), node))
        return made

    def _bound(self, name: str) -> bool:
        """Whether the variable surely has a value: a parameter, or one assigned at the top of the method."""
        code = self.code.source.function.__code__
        given = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        return name in given or any(target(s) == name for s in self.code.tree.body)

    def _loop(self, node: ast.For | ast.While, env: dict[str, Described]) -> list[ast.stmt]:
        """A loop: what waits at its end may be joined at the start of the next turn."""
        first = [self._settled(n, node, env) for n in sorted(env)]
        changed = self.code.waiting & {target(s) for s in ast.walk(node) if isinstance(s, ast.stmt)}
        was, self.calls.live = self.calls.live, False
        body = self.block(node.body, node.body if self._known_turns(node) else [], {})
        self.calls.live = was
        orelse = self.block(node.orelse, [], {})
        made: ast.stmt
        if isinstance(node, ast.For):
            over, _ = self.calls.expression(node.iter, env)
            made = ast.copy_location(ast.For(node.target, over, body, orelse), node)
        else:
            test, _ = self.calls.expression(node.test, env)
            made = ast.copy_location(ast.While(test, body, orelse), node)
        last = [assign(n, made_by(NOW, load(n)), node) for n in sorted(changed) if self._bound(n)]
        return [*first, made, *last]

    def _known_turns(self, node: ast.For | ast.While) -> bool:
        """Whether no code runs between two turns of the loop."""
        if isinstance(node, ast.While):
            return False
        over = [node.iter]
        while over:
            one = over.pop()
            if isinstance(one, ast.Call) and self.code.value(one.func) in (zip, enumerate, reversed, range):
                over += one.args
            elif not (isinstance(one, ast.Constant) or type(self.code.value(one)) in _LISTS):
                return False
        return True

    def _other(self, node: ast.stmt, env: dict[str, Described]) -> ast.stmt:
        """Any other statement: its expressions and blocks, each for itself."""
        if isinstance(node, SCOPES):
            return node
        within = isinstance(node, ast.With | ast.Try) or type(node).__name__ == "TryStar"
        self.next_use.guarded += within
        made = type(node)(**{name: self._part(value, env) for name, value in ast.iter_fields(node)})
        self.next_use.guarded -= within
        return ast.copy_location(made, node)

    def _part(self, value: Any, env: dict[str, Described]) -> Any:
        if isinstance(value, list):
            if value and all(isinstance(v, ast.stmt) for v in value):
                return self.block(value, [], env)
            return [self._part(v, env) for v in value]
        if isinstance(value, ast.expr):
            return self.calls.expression(value, env)[0]
        if isinstance(value, ast.excepthandler | ast.withitem | ast.match_case):
            made = type(value)(**{name: self._part(v, env) for name, v in ast.iter_fields(value)})
            return ast.copy_location(made, value) if hasattr(value, "lineno") else made
        return value
