"""Small questions to a syntax tree, and small nodes: what the readers of a model's source share."""

import ast
from collections.abc import Iterable, Iterator, Sequence

#: Nodes with names of their own.
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def inside(body: Iterable[ast.stmt], *closed: type[ast.AST]) -> Iterator[ast.AST]:
    """All nodes of the statements, ``closed`` ones included, but not what stands in these."""
    waiting: list[ast.AST] = list(body)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, closed):
            waiting += ast.iter_child_nodes(node)


def mentions(node: ast.AST | Sequence[ast.AST], name: str) -> int:
    """How often a name stands in a node, or in several."""
    nodes = node if isinstance(node, Sequence) else (node,)
    return sum(isinstance(n, ast.Name) and n.id == name for one in nodes for n in ast.walk(one))


def has(node: ast.AST, *kinds: type[ast.AST]) -> bool:
    """Whether a node, or one in it, is of one of the kinds."""
    return any(isinstance(n, kinds) for n in ast.walk(node))


def called_in(node: ast.AST) -> list[ast.expr]:
    """What the calls in a node call."""
    return [n.func for n in ast.walk(node) if isinstance(n, ast.Call)]


def target(statement: ast.stmt) -> str | None:
    """The one name that a statement assigns a value to."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        to: ast.expr = statement.targets[0]
    elif isinstance(statement, ast.AnnAssign | ast.AugAssign) and statement.value is not None:
        to = statement.target
    else:
        return None
    return to.id if isinstance(to, ast.Name) else None


def load(name: str) -> ast.Name:
    """A reading of a variable."""
    return ast.Name(name, ast.Load())


def assign(name: str, value: ast.expr, like: ast.AST) -> ast.stmt:
    """``name = value``, in the place of ``like``."""
    return ast.copy_location(ast.Assign([ast.Name(name, ast.Store())], value), like)
