"""What next reads a variable that holds a waiting call, and whether it may join that."""

import ast
from collections.abc import Iterator, Sequence

from ..graph.source import UNKNOWN, live_test
from ..graph.trees import called_in, has, mentions, target
from .expressions import Expressions

OTHER_CODE = "code that may look at the layer runs before its output is used"


class NextUse:
    """The readers of the variables of one method; ``guarded``: how deep inside try and with statements."""

    def __init__(self, code: Expressions) -> None:
        self.code = code
        self.guarded = 0

    def called(self, name: str, rest: Sequence[ast.stmt]) -> list[ast.expr]:
        """What is known to be called until the variable is read."""
        called: list[ast.expr] = []
        for statement in rest:
            called += called_in(statement)
            if mentions(statement, name) and not isinstance(statement, ast.If):
                break
        return [f for f in called if self.code.value(f) is not UNKNOWN and self.code.value(f) is not getattr]

    def link(self, rest: Sequence[ast.stmt], name: str, *, whole: bool = True) -> str:
        """Whether what next reads a variable may join: "next", "later" if other code runs before, or "".

        ``whole``: whether ``rest`` is all that follows in the method.
        """
        between = False
        for i, statement in enumerate(rest):
            if not mentions(statement, name):
                if not self.code.harmless(statement):
                    return ""
                between = between or has(statement, ast.Call, ast.Subscript, ast.AugAssign)
                continue
            found = self._takes(statement, name, last=whole and self.is_dead(name, rest[i + 1 :]))
            if found:
                return "later" if between else found
            if not isinstance(statement, ast.If) or mentions(statement.test, name):
                return ""
            arms = [self._arm(arm, name) for arm in (statement.body, statement.orelse)]
            if "" in arms or not self.code.harmless_test(statement.test):
                return ""
            if {"next", "later"} & {*arms}:
                return "next" if not between and {*arms} <= {"next", "nothing runs"} else "later"
            between = True
        return ""

    def _arm(self, arm: Sequence[ast.stmt], name: str) -> str:
        """What a branch does with a waiting call: "next", "later", "reads", "runs", "nothing runs", ""."""
        read = next((i for i, statement in enumerate(arm) if mentions(statement, name)), len(arm))
        if not all(map(self.code.harmless, arm[:read])) and not self.link(arm, name, whole=False):
            return ""
        if read < len(arm):
            return self.link(arm, name, whole=False) or "reads"
        return "runs" if any(has(statement, ast.Call) for statement in arm) else "nothing runs"

    def _takes(self, statement: ast.stmt, name: str, *, last: bool) -> str:
        """Whether a statement joins the variable and nothing else reads it: "next", "later" or ""."""
        if isinstance(statement, ast.Return):
            if self.guarded or statement.value is None:
                return ""
            plain = isinstance(statement.value, ast.Name) and statement.value.id == name
            return "next" if plain else self._joins(statement.value, name)
        to = target(statement)
        if to is None or to in self.code.hidden:
            return ""
        if isinstance(statement, ast.AugAssign):
            value = statement.value
            fits = to == name and isinstance(statement.op, ast.Add) and not mentions(value, name)
            fits = fits and (self.code.may_wait(value) or self.code.harmless(value))
            return ("later" if has(value, ast.Call) else "next") if fits else ""
        if to != name and not (last or self.read_once(name)):
            return ""
        return self._joins(statement.value, name)  # type: ignore[attr-defined]

    def read_once(self, name: str) -> bool:
        """Whether the method reads a variable in one place, once."""
        return self.code.loads.get(name) == 1 and not self._in_a_loop(name)

    def is_dead(self, name: str, after: Sequence[ast.stmt]) -> bool:
        """Whether nothing reads a variable any more; ``after``: all statements that follow."""
        return not (self.guarded or mentions(after, name) or self._in_a_loop(name))

    def _in_a_loop(self, name: str) -> bool:
        loops = [n for n in ast.walk(self.code.tree) if isinstance(n, ast.For | ast.While)]
        return any(mentions(loop, name) for loop in loops)

    def _joins(self, node: ast.expr, name: str) -> str:
        """Whether an expression is one that joins the variable, which stands in it once."""
        if mentions(node, name) != 1:
            return ""
        if isinstance(node, ast.Call):
            named = [k.value for k in node.keywords]
            if self.code.is_method_call(node):
                inner, others = node.func.value, [*node.args, *named]  # type: ignore[attr-defined]
            elif node.args and not isinstance(node.args[0], ast.Starred):
                inner, others = node.args[0], [node.func, *node.args[1:], *named]
                if isinstance(inner, ast.Name) and self.code.step(node) is None:
                    return ""
            else:
                return ""
            if not all(map(self.code.harmless, others)):
                return ""
            found = "next" if isinstance(inner, ast.Name) and inner.id == name else self._joins(inner, name)
            return "later" if found and any(has(o, ast.Call) for o in others) else found
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            sides = (node.left, node.right)
            inner, other = sides if mentions(node.left, name) else sides[::-1]
            if not (self.code.harmless(other) or self.code.may_wait(other)):
                return ""
            found = "next" if isinstance(inner, ast.Name) else self._joins(inner, name)
            return "later" if found and has(other, ast.Call) else found
        if not isinstance(node, ast.IfExp) or mentions(node.test, name):
            return ""
        if self.code.harmless_test(node.test):
            arms = [a for a in (node.body, node.orelse) if mentions(a, name)]
            return "later" if all(isinstance(a, ast.Name) or self._joins(a, name) for a in arms) else ""
        return ""

    def own_names(self, value: ast.expr, name: str) -> int:
        """How many other local names hold the input and are not read before the variable is."""
        start = value
        while isinstance(start, ast.Call) and not self.code.is_start(start) and start.args:
            start = start.args[0]
        given = start.args[0] if isinstance(start, ast.Call) and start.args else None
        idle = isinstance(given, ast.Name) and given.id != name and given.id not in self.code.hidden
        if idle and self.code.loads.get(given.id) == 1:  # type: ignore[union-attr]
            return 1
        return 0

    def reason(self, rest: Sequence[ast.stmt], name: str) -> str:
        """What next reads a variable, in words."""
        for statement in self._living(rest):
            if not mentions(statement, name) and not self.code.harmless(statement):
                return OTHER_CODE
            for node in ast.walk(statement):
                if isinstance(node, ast.Call) and any(
                    isinstance(a, ast.Name) and a.id == name for a in node.args
                ):
                    return f"followed by {self.code.name_of(node.func)}"
            if mentions(statement, name):
                break
        return "its output is used in several places"

    def _living(self, statements: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
        """Statements without the branches that are not taken, as far as the attributes tell."""
        for statement in statements:
            if isinstance(statement, ast.If):
                taken = live_test(statement.test, self.code.module, self.code.names)
                yield from self._living([*(statement.body if taken is not False else ())])
                yield from self._living([*(statement.orelse if taken is not True else ())])
            else:
                yield statement
