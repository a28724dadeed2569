"""Whether code that names a module may run what is in its children, and not only call these.

``for block in self.blocks: x = block(x)`` calls each block whole. ``block[0](x)``, ``for layer in block`` and
``list(self.blocks)[0][0]`` go further in, where no place in the source names what runs.
"""

import ast
from collections.abc import Sequence
from functools import lru_cache

from .source import Source

_CHILDREN = {"children", "named_children", "_modules", "values", "items"}
_ALL = {"modules", "named_modules", "get_submodule", "__dict__"}
_SAME = {"enumerate", "zip", "reversed", "list", "tuple", "iter", "sorted", "filter"}
_ASKS = {"isinstance", "issubclass", "type", "id", "hasattr", "getattr", "len", "bool", "callable", "print"}
_ASKS |= {"str", "repr", "checkpoint", "checkpoint_seq", "checkpoint_sequential"}
_KEEPS = ast.Return | ast.Yield | ast.Starred | ast.Dict | ast.Set | ast.keyword | ast.Lambda | ast.withitem


def spreads(node: ast.AST, source: Source, *, depth: int = 0) -> bool:
    """Whether more than the children of a module may run from where ``node`` stands for it.

    ``depth``: 1 where it stands for one of the children.
    """
    stored = isinstance(getattr(node, "ctx", None), ast.Store | ast.Del)
    return not stored and _Spread(source).out(node, depth)


@lru_cache(maxsize=1024)
def _above(source: Source) -> dict[ast.AST, ast.AST]:
    return {child: node for node in ast.walk(source.tree) for child in ast.iter_child_nodes(node)}


class _Spread:
    def __init__(self, source: Source) -> None:
        self.above = _above(source)
        self.seen: set[tuple[str, int]] = set()

    def out(self, inner: ast.AST, depth: int) -> bool:
        """Follow an expression outwards; it stands for what lies ``depth`` levels below the module."""
        while depth < 4:
            node = self.above.get(inner)
            if isinstance(node, ast.Subscript) and node.value is inner:
                depth += depth > 0 or not isinstance(node.slice, ast.Slice)  # a part of a child can be called
            elif isinstance(node, ast.Attribute):
                if node.attr not in _CHILDREN:
                    return node.attr in _ALL or (node.attr in ("forward", "__call__") and depth > 1)
            elif isinstance(node, ast.Call):
                name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                lists = isinstance(inner, ast.Attribute) and inner.attr in _CHILDREN
                if node.func is inner and not lists:
                    return depth > 1
                if node.func is not inner and name not in (*_SAME, "next"):
                    return name not in _ASKS
                depth += name == "next"
            elif isinstance(node, ast.List | ast.Tuple):
                depth -= 1
            elif isinstance(node, ast.For | ast.comprehension) and node.iter is inner:
                return self._named(_elements(node), depth + 1)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                return self._stored(targets, depth)
            elif isinstance(node, ast.NamedExpr):
                if self._named([node.target], depth):
                    return True
            elif not isinstance(node, ast.IfExp | ast.BoolOp) or inner is getattr(node, "test", None):
                return isinstance(node, _KEEPS)
            assert node is not None
            inner = node
        return True

    def _stored(self, targets: Sequence[ast.expr], depth: int) -> bool:
        """The same of what an assignment stores: in names, which are followed, or elsewhere."""
        if any(isinstance(t, ast.Tuple | ast.List) for t in targets):  # what is in it, one by one
            return self._named(targets, depth + 1)
        names = [t for t in targets if isinstance(t, ast.Name)]
        return (depth > 0 and len(names) < len(targets)) or self._named(names, depth)

    def _named(self, targets: Sequence[ast.expr], depth: int) -> bool:
        """Whether what the names stand for spreads from where one of them is read."""
        names = {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
        names -= {name for name in names if (name, depth) in self.seen}
        self.seen |= {(name, depth) for name in names}
        loads = (n for n in self.above if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load))
        return any(self.out(n, depth) for n in loads if n.id in names)


def _elements(loop: ast.For | ast.comprehension) -> list[ast.expr]:
    """The targets of a loop that may be modules: not the number or the name in front of one."""
    call, target = loop.iter, loop.target
    name = getattr(call.func, "id", getattr(call.func, "attr", "")) if isinstance(call, ast.Call) else ""
    counts = name in ("enumerate", "items", "named_children") and isinstance(target, ast.Tuple)
    return target.elts[1:] if counts else [target]  # type: ignore[attr-defined]
