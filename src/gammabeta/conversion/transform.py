"""Rewrite the source of a method so that what follows a batch norm may join its pass.

Only a few expressions change: ``self.bn(x)`` becomes ``call(self.bn, x)``, which may give a ``Pending``; an
addition or a call that may join it is made through ``add`` and ``call`` too. A local variable that may hold a
``Pending`` is read through ``now`` everywhere else. Where other code runs in between, ``hold`` keeps it only
if nothing can change its input meanwhile. All else in the method stays as it is written.

The same walk describes what will join which layer, as far as the module's attributes tell: for the report.
"""

import ast
import builtins
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn import Module

from ..epilogue import ACTIVATIONS
from ..graph.source import UNKNOWN, Source, live_test, live_value
from .pending import BATCH_NORM_FUNCTIONS, Joined, Step, is_plain_function, plain, step_of

CALL, METHOD, ADD, IADD, NOW, HOLD = (
    f"_gammabeta_{name}" for name in ("call", "method", "add", "iadd", "now", "hold")
)
_METHODS = {call for row in ACTIVATIONS.values() for call in row.calls if isinstance(call, str)} | {
    "add",
    "add_",
}
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_SEES_LOCALS = {"locals", "vars", "eval", "exec", "_getframe", "globals"}


OTHER_CODE = "code that may look at the layer runs before its output is used"
_LISTS = (nn.ModuleList, nn.Sequential, list, tuple, int)


class Described(Joined):
    """What is known before a run of a layer's call: what will join it."""

    def __init__(self, layer: Module | None) -> None:
        super().__init__()
        self.layer = layer

    @property
    def images(self) -> bool:
        """Whether the layer, if it is known, is one for images."""
        known = isinstance(self.layer, nn.modules.batchnorm._NormBase)
        return not known or isinstance(self.layer, nn.BatchNorm2d | nn.LazyBatchNorm2d)

    def again(self) -> "Described":
        """Another call of the same kind."""
        twin = Described(self.layer)
        twin.residual, twin.activation, twin.pool = self.residual, self.activation, self.pool
        return twin


@dataclass
class Outlook:
    """What a rewritten method will do, as far as it can be told."""

    fused: dict[Module, tuple[str, str]] = field(default_factory=dict)  # what joins, and why not more
    returned: Described | None = None
    written: set[Module] = field(default_factory=set)  # torch's layers whose tail the method computes
    functional: bool = False  # whether it calls torch's function batch_norm
    returns_waiting: bool = False  # whether what it returns may be a waiting call, in some run


#: Says of a module what a call of it starts, or None: a batch norm, or a module that ends in one.
Starts = Callable[[Module], Described | None]


def rewrite(module: Module, source: Source, starts: Starts) -> tuple[ast.FunctionDef, Outlook] | None:
    """The method as a new tree, and what it will do; None if it calls no batch norm, or shows its locals."""
    rewriting = _Rewriting(module, source, starts)
    return rewriting.result()


def has_plain_code(module: Module, source: Source) -> bool:
    """Whether a forward only names and passes on what it is given, and calls plain modules and functions."""
    return _Rewriting(module, source, lambda _: None).has_plain_code()


class _Names(Mapping[str, Any]):
    """The values of a method's names that it does not assign itself."""

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


# --- reading trees ----------------------------------------------------------------------------------------


def _mentions(node: ast.AST | Sequence[ast.AST], name: str) -> int:
    nodes = node if isinstance(node, Sequence) else (node,)
    return sum(isinstance(n, ast.Name) and n.id == name for one in nodes for n in ast.walk(one))


def _has(node: ast.AST, *kinds: type[ast.AST]) -> bool:
    return any(isinstance(n, kinds) for n in ast.walk(node))


def _called_in(node: ast.AST) -> list[ast.expr]:
    return [n.func for n in ast.walk(node) if isinstance(n, ast.Call)]


def _target(statement: ast.stmt) -> str | None:
    """The one name that a statement assigns a value to."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target: ast.expr = statement.targets[0]
    elif isinstance(statement, ast.AnnAssign | ast.AugAssign) and statement.value is not None:
        target = statement.target
    else:
        return None
    return target.id if isinstance(target, ast.Name) else None


def _load(name: str) -> ast.Name:
    return ast.Name(name, ast.Load())


def _assign(name: str, value: ast.expr, like: ast.AST) -> ast.stmt:
    return ast.copy_location(ast.Assign([ast.Name(name, ast.Store())], value), like)


class _Rewriting:
    def __init__(self, module: Module, source: Source, starts: Starts) -> None:
        self.module, self.source, self.starts = module, source, starts
        self.names = _Names(module, source)
        self.outlook = Outlook()
        self.tree = source.tree
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
        self.guarded = 0  # how deep inside try and with statements
        self.live = True

    def result(self) -> tuple[ast.FunctionDef, Outlook] | None:
        if any(isinstance(n, ast.Name) and n.id in _SEES_LOCALS for n in ast.walk(self.tree)):
            return None
        if not any(isinstance(n, ast.Call) and self._is_start(n) for n in self._nodes()):
            return None
        while True:  # names that may hold a waiting call, until no more are found
            before = set(self.waiting)
            for node in self._nodes():
                name = _target(node) if isinstance(node, ast.stmt) else None
                if name is not None and name not in self.hidden and self._may_wait(node.value):  # type: ignore[attr-defined]
                    self.waiting.add(name)
            if self.waiting == before:
                break
        body = self.block(self.tree.body, [], {})
        tree = ast.FunctionDef(self.tree.name, self.tree.args, body, [], None)
        return ast.copy_location(tree, self.tree), self.outlook

    # What is in the method

    def _nodes(self) -> Iterator[ast.AST]:
        """Everything in it but what stands in functions and comprehensions of its own."""
        waiting: list[ast.AST] = list(self.tree.body)
        while waiting:
            node = waiting.pop()
            yield node
            if not isinstance(node, (*_SCOPES, *_COMPREHENSIONS)):
                waiting += ast.iter_child_nodes(node)

    def _hidden_names(self) -> set[str]:
        """Names that inner functions and comprehensions see, or that are not only assigned by ``=``."""
        inner = [
            n
            for n in ast.walk(self.tree)
            if isinstance(n, (*_SCOPES, *_COMPREHENSIONS)) and n is not self.tree
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

    def _is_start(self, node: ast.Call) -> bool:
        """Whether a call may be one of a batch norm."""
        if not node.args or isinstance(node.args[0], ast.Starred):
            return False
        callee = self.value(node.func)
        if isinstance(callee, Module):
            tail = vars(callee).get("_tail")
            if tail is not None and (any(tail) or len(node.args) > 1 or node.keywords):
                self.outlook.written.add(callee)
                return True
            return self.starts(callee) is not None
        if callee is UNKNOWN:
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

    def _step(self, node: ast.Call, skip: int = 1) -> Step | bool | None:
        """What a call does to its first argument: a step, None for anything else, True if it is not known."""
        callee = self.value(node.func)
        if callee is UNKNOWN:
            return None if self._is_method(node.func) else True
        args = [self.value(a) for a in node.args[skip:]]
        named = {k.arg: self.value(k.value) for k in node.keywords}
        if any(a is UNKNOWN for a in (*args, *named.values())) or None in named:
            return True if callable(callee) and not isinstance(callee, Module) else None
        if isinstance(callee, Module) and self.starts(callee) is not None:
            return None
        return step_of(callee, tuple(args), named)  # type: ignore[arg-type]

    def _method(self, node: ast.Call) -> bool:
        """Whether it is a call ``x.relu()`` of a method that may join."""
        return (
            isinstance(node.func, ast.Attribute)
            and node.func.attr in _METHODS
            and self.value(node.func.value) is UNKNOWN
        )

    def _may_wait(self, node: ast.expr | None) -> bool:
        """Whether an expression may give a waiting call."""
        if isinstance(node, ast.Name):
            return node.id in self.waiting
        if isinstance(node, ast.Call):
            if self._is_start(node):
                return True
            if self._method(node):
                return self._may_wait(node.func.value)  # type: ignore[attr-defined]
            joins = bool(node.args) and self._may_wait(node.args[0]) and self._step(node) is not None
            return joins and all(map(self.harmless, [node.func, *node.args[1:], *node.keywords]))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            left, right = self._may_wait(node.left), self._may_wait(node.right)
            return (left and (right or self.harmless(node.right))) or (right and self.harmless(node.left))
        if isinstance(node, ast.IfExp):
            return self._may_wait(node.body) or self._may_wait(node.orelse)
        return False

    def harmless(self, node: ast.AST) -> bool:
        """Whether a call may wait while code runs: it takes and names what is known, and calls plain modules.

        All else could read or write what the waiting call is to read or write.
        """
        if isinstance(node, ast.If | ast.IfExp):
            arms = [*node.body, *node.orelse] if isinstance(node, ast.If) else [node.body, node.orelse]
            return self._harmless_test(node.test) and all(map(self.harmless, arms))
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

    def _harmless_test(self, node: ast.expr) -> bool:
        """The same for a condition: of values that are known, or whether a name is None."""
        if isinstance(node, ast.BoolOp):
            return all(map(self._harmless_test, node.values))
        if isinstance(node, ast.UnaryOp):
            return self._harmless_test(node.operand)
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

    # What comes next

    def _hold(self, name: str, rest: Sequence[ast.stmt], known: int = 0) -> ast.expr:
        """``hold(name, known, what is called until the variable is read)``."""
        called: list[ast.expr] = []
        for statement in rest:
            called += _called_in(statement)
            if _mentions(statement, name) and not isinstance(statement, ast.If):
                break
        known_callees = [f for f in called if self.value(f) is not UNKNOWN and self.value(f) is not getattr]
        return self._call(HOLD, _load(name), ast.Constant(known), *known_callees)

    def _link(self, rest: Sequence[ast.stmt], name: str, *, whole: bool = True) -> str:
        """Whether what next reads a variable may join: "next", "later" if other code runs before, or "".

        ``whole``: whether ``rest`` is all that follows in the method.
        """
        between = False
        for i, statement in enumerate(rest):
            if not _mentions(statement, name):
                if not self.harmless(statement):
                    return ""
                between = between or _has(statement, ast.Call, ast.Subscript, ast.AugAssign)
                continue
            found = self._takes(statement, name, last=whole and self._is_dead(name, rest[i + 1 :]))
            if found:
                return "later" if between else found
            if not isinstance(statement, ast.If) or _mentions(statement.test, name):
                return ""
            arms = [self._arm(arm, name) for arm in (statement.body, statement.orelse)]
            if "" in arms or not self._harmless_test(statement.test):
                return ""
            if {"next", "later"} & {*arms}:
                return "next" if not between and {*arms} <= {"next", "nothing runs"} else "later"
            between = True
        return ""

    def _arm(self, arm: Sequence[ast.stmt], name: str) -> str:
        """What a branch does with a waiting call: "next", "later", "reads", "runs", "nothing runs", ""."""
        read = next((i for i, statement in enumerate(arm) if _mentions(statement, name)), len(arm))
        if not all(map(self.harmless, arm[:read])) and not self._link(arm, name, whole=False):
            return ""
        if read < len(arm):
            return self._link(arm, name, whole=False) or "reads"
        return "runs" if any(_has(statement, ast.Call) for statement in arm) else "nothing runs"

    def _takes(self, statement: ast.stmt, name: str, *, last: bool) -> str:
        """Whether a statement joins the variable and nothing else reads it: "next", "later" or ""."""
        if isinstance(statement, ast.Return):
            if self.guarded or statement.value is None:
                return ""
            plain = isinstance(statement.value, ast.Name) and statement.value.id == name
            return "next" if plain else self._joins(statement.value, name)
        target = _target(statement)
        if target is None or target in self.hidden:
            return ""
        if isinstance(statement, ast.AugAssign):
            value = statement.value
            fits = target == name and isinstance(statement.op, ast.Add) and not _mentions(value, name)
            fits = fits and (self._may_wait(value) or self.harmless(value))
            return ("later" if _has(value, ast.Call) else "next") if fits else ""
        if target != name and not (last or self._read_once(name)):
            return ""
        return self._joins(statement.value, name)  # type: ignore[attr-defined]

    def _read_once(self, name: str) -> bool:
        return self.loads.get(name) == 1 and not self._in_a_loop(name)

    def _is_dead(self, name: str, after: Sequence[ast.stmt]) -> bool:
        """Whether nothing reads a variable any more; ``after``: all statements that follow."""
        return not (self.guarded or _mentions(after, name) or self._in_a_loop(name))

    def _in_a_loop(self, name: str) -> bool:
        loops = [n for n in ast.walk(self.tree) if isinstance(n, ast.For | ast.While)]
        return any(_mentions(loop, name) for loop in loops)

    def _joins(self, node: ast.expr, name: str) -> str:
        """Whether an expression is one that joins the variable, which stands in it once."""
        if _mentions(node, name) != 1:
            return ""
        if isinstance(node, ast.Call):
            if self._method(node):
                inner, others = node.func.value, [*node.args, *node.keywords]  # type: ignore[attr-defined]
            elif node.args and not isinstance(node.args[0], ast.Starred) and self._step(node) is not None:
                inner, others = node.args[0], [node.func, *node.args[1:], *node.keywords]
            else:
                return ""
            if not all(
                map(
                    self.harmless,
                    (getattr(o, "value", o) if isinstance(o, ast.keyword) else o for o in others),
                )
            ):
                return ""
            found = "next" if isinstance(inner, ast.Name) and inner.id == name else self._joins(inner, name)
            return "later" if found and any(_has(o, ast.Call) for o in others) else found
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            sides = (node.left, node.right)
            inner, other = sides if _mentions(node.left, name) else sides[::-1]
            if not (self.harmless(other) or self._may_wait(other)):
                return ""
            found = "next" if isinstance(inner, ast.Name) else self._joins(inner, name)
            return "later" if found and _has(other, ast.Call) else found
        if isinstance(node, ast.IfExp) and not _mentions(node.test, name) and self._harmless_test(node.test):
            arms = [a for a in (node.body, node.orelse) if _mentions(a, name)]
            return "later" if all(isinstance(a, ast.Name) or self._joins(a, name) for a in arms) else ""
        return ""

    # Statements

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
        name = _target(node)
        if isinstance(node, ast.AugAssign):
            if name in self.waiting and isinstance(node.op, ast.Add):
                return self._augmented(node, str(name), rest, env)
            value, _ = self.expression(node.value, env)
            first = [self._settled(str(name), node, env)] if name in self.waiting else []
            return [*first, self._like(node, ast.AugAssign(node.target, node.op, value))]
        if name is not None and name in self.waiting and self._may_wait(node.value):  # type: ignore[attr-defined]
            return self._waits(node, name, rest, env)
        if isinstance(node, ast.Return) and node.value is not None:
            waits = not self.guarded and self._may_wait(node.value)
            value, found = self.expression(node.value, env, wait=waits, passing=self.waiting)
            self.outlook.returns_waiting |= waits
            if found is not None and self.live:
                self.outlook.returned = found
                self._note(found, "its output leaves the module")
            return [self._like(node, ast.Return(value))]
        if isinstance(node, ast.If):
            return self._branches(node, rest, env)
        if isinstance(node, ast.For | ast.While):
            return self._loop(node, env)
        if name is not None:
            env.pop(name, None)
        return [self._other(node, env)]

    def _like(self, old: ast.AST, new: Any) -> Any:
        return ast.copy_location(new, old)

    def _waits(
        self, node: Any, name: str, rest: Sequence[ast.stmt], env: dict[str, Described]
    ) -> list[ast.stmt]:
        """An assignment of what may be a waiting call."""
        once = _mentions(node.value, name) == 1
        ends = {n for n in self.waiting if _mentions(node.value, n) == 1 and self._is_dead(n, rest)}
        passing = {n for n in self.waiting if self._read_once(n)} | ends | ({name} if once else set())
        link = self._link(rest, name)
        why = "" if link else self._reason(rest, name)
        value, found = self.expression(node.value, env, wait=bool(link), passing=passing, why=why)
        made = [_assign(name, value, node)]
        if link == "later":
            made.append(_assign(name, self._hold(name, rest, self._own_names(node.value, name)), node))
        env.pop(name, None)
        if link and found is not None:
            env[name] = found
        return made

    def _own_names(self, value: ast.expr, name: str) -> int:
        """How many other local names hold the input and are not read before the variable is."""
        start = value
        while isinstance(start, ast.Call) and not self._is_start(start) and start.args:
            start = start.args[0]
        given = start.args[0] if isinstance(start, ast.Call) and start.args else None
        idle = isinstance(given, ast.Name) and given.id != name and given.id not in self.hidden
        if idle and self.loads.get(given.id) == 1:  # type: ignore[union-attr]
            return 1
        return 0

    def _augmented(
        self, node: ast.AugAssign, name: str, rest: Sequence[ast.stmt], env: dict[str, Described]
    ) -> list[ast.stmt]:
        value, other = self.expression(
            node.value, env, wait=not _mentions(node.value, name), why="followed by add"
        )
        if other is not None:
            self._note(other, "it is added to another batch norm")
        found = env.pop(name, None)
        if found is not None and not found.joins(("residual", True)):
            self._note(found, "followed by add")
            found = None
        first: list[ast.stmt] = []
        if _has(node.value, ast.Call):
            first = [_assign(name, self._hold(name, [node]), node)]
        link = self._link(rest, name)
        made = self._call(IADD, _load(name), value)
        if link:
            if found is not None:
                env[name] = found
        else:
            made = self._call(NOW, made)
            if found is not None:
                self._note(found, self._reason(rest, name))
        tail = [_assign(name, self._hold(name, rest), node)] if link == "later" else []
        return [*first, _assign(name, made, node), *tail]

    def _settled(self, name: str, node: ast.AST, env: dict[str, Described]) -> ast.stmt:
        """``name = now(name)``."""
        found = env.pop(name, None)
        if found is not None:
            self._note(found, "its output is used in several places")
        return _assign(name, self._call(NOW, _load(name)), node)

    def _branches(self, node: ast.If, rest: Sequence[ast.stmt], env: dict[str, Described]) -> list[ast.stmt]:
        test, _ = self.expression(node.test, env)
        taken = live_test(node.test, self.module, self.names)
        ends: list[dict[str, Described]] = []
        arms: list[list[ast.stmt]] = []
        was = self.live
        for arm, holds in ((node.body, True), (node.orelse, False)):
            self.live = was and taken in (None, holds)
            end = {n: d if taken is holds else d.again() for n, d in env.items()}
            arms.append(self.block(arm, rest, end))
            if taken in (None, holds):
                ends.append(end)
        self.live = was
        env.clear()
        env.update(ends[-1])
        made: list[ast.stmt] = [self._like(node, ast.If(test, arms[0] or [ast.Pass()], arms[1]))]
        touched = {n for n in self.waiting if _mentions([*node.body, *node.orelse], n)}
        for name in sorted(touched):
            link = self._link(rest, name)
            if not link:
                made.append(
                    _assign(name, self._call(NOW, _load(name)), node) if self._bound(name) else ast.Pass()
                )
                found = env.pop(name, None)
                if found is not None:
                    self._note(found, self._reason(rest, name))
            elif link == "later" and self._bound(name):
                made.append(_assign(name, self._hold(name, rest), node))
        return made

    def _bound(self, name: str) -> bool:
        """Whether the variable surely has a value: a parameter, or one assigned at the top of the method."""
        code = self.source.function.__code__
        given = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        return name in given or any(_target(s) == name for s in self.tree.body)

    def _loop(self, node: ast.For | ast.While, env: dict[str, Described]) -> list[ast.stmt]:
        """A loop: what waits at its end may be joined at the start of the next turn."""
        first = [self._settled(n, node, env) for n in sorted(env)]
        changed = {
            n for n in self.waiting if any(_target(s) == n for s in ast.walk(node) if isinstance(s, ast.stmt))
        }
        was, self.live = self.live, False
        body = self.block(node.body, node.body if self._known_turns(node) else [], {})
        self.live = was
        orelse = self.block(node.orelse, [], {})
        made: ast.stmt
        if isinstance(node, ast.For):
            over, _ = self.expression(node.iter, env)
            made = self._like(node, ast.For(node.target, over, body, orelse))
        else:
            test, _ = self.expression(node.test, env)
            made = self._like(node, ast.While(test, body, orelse))
        last = [_assign(n, self._call(NOW, _load(n)), node) for n in sorted(changed) if self._bound(n)]
        return [*first, made, *last]

    def _known_turns(self, node: ast.For | ast.While) -> bool:
        """Whether no code runs between two turns of the loop."""
        if isinstance(node, ast.While):
            return False
        over = [node.iter]
        while over:
            one = over.pop()
            if isinstance(one, ast.Call) and self.value(one.func) in (zip, enumerate, reversed, range):
                over += one.args
            elif not (isinstance(one, ast.Constant) or type(self.value(one)) in _LISTS):
                return False
        return True

    def _other(self, node: ast.stmt, env: dict[str, Described]) -> ast.stmt:
        """Any other statement: its expressions and blocks, each for itself."""
        if isinstance(node, _SCOPES):
            return node
        within = isinstance(node, ast.With | ast.Try) or type(node).__name__ == "TryStar"
        self.guarded += within
        made = type(node)(**{name: self._part(value, env) for name, value in ast.iter_fields(node)})
        self.guarded -= within
        return ast.copy_location(made, node)

    def _part(self, value: Any, env: dict[str, Described]) -> Any:
        if isinstance(value, list):
            if value and all(isinstance(v, ast.stmt) for v in value):
                return self.block(value, [], env)
            return [self._part(v, env) for v in value]
        if isinstance(value, ast.expr):
            return self.expression(value, env)[0]
        if isinstance(value, ast.excepthandler | ast.withitem | ast.match_case):
            made = type(value)(**{name: self._part(v, env) for name, v in ast.iter_fields(value)})
            return ast.copy_location(made, value) if hasattr(value, "lineno") else made
        return value

    # Expressions

    def _call(self, helper: str, *args: ast.expr) -> ast.expr:
        return ast.Call(_load(helper), list(args), [])

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
        if isinstance(node, ast.Name) and node.id in self.waiting and isinstance(node.ctx, ast.Load):
            if wait and node.id in passing:
                return node, env.pop(node.id, None)
            found = env.pop(node.id, None)
            if found is not None:
                self._note(found, why or "its output is used in several places")
            value = ast.NamedExpr(ast.Name(node.id, ast.Store()), self._call(NOW, _load(node.id)))
            return ast.copy_location(value, node), None
        if self._may_wait(node) and not isinstance(node, ast.Name):
            made, found = self._waiting(node, env, passing)
            ast.copy_location(made, node)
            if wait:
                return made, found
            if found is not None:
                self._note(found, why or "its output is used in several places")
            return ast.copy_location(self._call(NOW, made), node), None
        if isinstance(node, (*_SCOPES, *_COMPREHENSIONS)):
            return node, None
        return self._plain(node, env), None

    def _plain(self, node: ast.expr, env: dict[str, Described]) -> ast.expr:
        if isinstance(node, ast.Call):
            why = f"followed by {self._name_of(node.func)}"
        else:
            why = f"followed by {node.attr}" if isinstance(node, ast.Attribute) else ""
        passing = {n for n in self.waiting if self._read_once(n)}

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
            taken = live_test(node.test, self.module, self.names)
            return ast.IfExp(test, body, orelse), one if taken in (True, None) else other
        assert isinstance(node, ast.Call)
        alone = not any(_has(a, ast.Call) for a in (*node.args[1:], *node.keywords))
        keywords = [ast.keyword(k.arg, self.expression(k.value, env)[0]) for k in node.keywords]
        if self._method(node):
            assert isinstance(node.func, ast.Attribute)
            value, found = self.expression(node.func.value, env, wait=alone, passing=passing)
            args = [self.expression(a, env)[0] for a in node.args]
            if node.func.attr in ("add", "add_"):
                step: Any = ("residual", True) if len(args) == 1 and not keywords else None
            else:
                step = step_of(node.func.attr, tuple(map(self.value, node.args)), {})
            made = ast.Call(_load(METHOD), [value, ast.Constant(node.func.attr), *args], keywords)
            return made, self._described(found, step, node.func.attr)
        func, _ = self.expression(node.func, env)
        name = self._name_of(node.func)
        step = self._step(node)
        join = step is not None
        first, found = self.expression(
            node.args[0], env, wait=alone and join, passing=passing, why=f"followed by {name}"
        )
        rest = [self.expression(a, env)[0] for a in node.args[1:]]
        made = ast.Call(_load(CALL), [func, first, *rest], keywords)
        found = self._described(found, step, name)
        callee = self.value(node.func)
        if isinstance(callee, Module) and self._is_start(node):
            started = self.starts(callee)
            found = started.again() if started is not None and not node.keywords and not rest else None
        elif any(callee is function for function in BATCH_NORM_FUNCTIONS):
            found = Described(self.module)
            self.outlook.functional = True
        return made, found

    def _sum(
        self, node: ast.BinOp, env: dict[str, Described], passing: Iterable[str]
    ) -> tuple[ast.expr, Described | None]:
        left, one = self.expression(node.left, env, wait=True, passing=passing)
        right, other = self.expression(node.right, env, wait=True, passing=passing)
        if self._may_wait(node.left) and _has(node.right, ast.Call):
            left = self._call(HOLD, left, ast.Constant(0), *_called_in(node.right))
        if one is not None and other is not None:
            self._note(other, "it is added to another batch norm")
        found = one or other
        return self._call(ADD, left, right), self._described(found, ("residual", True), "add")

    # What is known

    def _described(self, found: Described | None, step: Any, name: str) -> Described | None:
        if found is None:
            return None
        if isinstance(step, tuple) and found.joins(step):
            return found
        self._note(
            found, f"followed by {name}" if step is not True else "what follows it is known in a run only"
        )
        return None

    def _note(self, found: Described, reason: str) -> None:
        if self.live and found.layer is not None:
            text = str(found)
            known = self.outlook.fused.get(found.layer)
            if known is None or (text and not known[0]):
                self.outlook.fused[found.layer] = (text, reason)

    def _reason(self, rest: Sequence[ast.stmt], name: str) -> str:
        """What next reads a variable, in words."""
        if self.loads.get(name, 0) > 1 and sum(_mentions(s, name) for s in rest) > 1:
            several = "its output is used in several places"
        else:
            several = ""
        for statement in self._living(rest):
            if not _mentions(statement, name) and not self.harmless(statement):
                return OTHER_CODE
            for node in ast.walk(statement):
                if isinstance(node, ast.Call) and any(
                    isinstance(a, ast.Name) and a.id == name for a in node.args
                ):
                    return f"followed by {self._name_of(node.func)}"
            if _mentions(statement, name):
                break
        return several or "its output is used in several places"

    def _living(self, statements: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
        """Statements without the branches that are not taken, as far as the attributes tell."""
        for statement in statements:
            if isinstance(statement, ast.If):
                taken = live_test(statement.test, self.module, self.names)
                yield from self._living([*(statement.body if taken is not False else ())])
                yield from self._living([*(statement.orelse if taken is not True else ())])
            else:
                yield statement

    def _name_of(self, func: ast.expr) -> str:
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
