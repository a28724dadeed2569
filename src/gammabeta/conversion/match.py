"""What may be folded into a batch norm: ``+ residual``, an activation, a 2x2 mean pool or max pooling.

Each only where it is the sole use of what comes before it, and where nothing in between can change an input.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, Node

from ..epilogue import MaxPool, Pool
from ..graph.trace import IN_PLACE_OPERATORS, has_hooks
from ..kernels.backend import LARGEST_WINDOW

_MODULES: dict[type, str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.GELU: "gelu",
}
_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
    F.leaky_relu: "leaky_relu",
    F.leaky_relu_: "leaky_relu",
    F.silu: "silu",
    F.hardswish: "hardswish",
    F.gelu: "gelu",
    "relu": "relu",
    "relu_": "relu",
}
_ADD = (operator.add, torch.add, "add")
_ADD_IN_PLACE = (operator.iadd, "add_")
_IN_PLACE = {*IN_PLACE_OPERATORS, operator.setitem, F.relu_, torch.relu_, F.leaky_relu_}
_FRESH = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm)


@dataclass
class Chain:
    """A batch norm's call and what follows it, to become one call."""

    first: Node
    last: Node
    residual: Node | None = None
    activation: str | None = None
    pool: Pool = None
    folded: list[Node] = field(default_factory=list)
    why_not_more: str = ""

    def __bool__(self) -> bool:
        return bool(self.folded)

    def text(self) -> str:
        """What is folded, in order."""
        parts = ["residual"] if self.residual is not None else []
        parts += [self.activation] if self.activation else []
        if isinstance(self.pool, MaxPool):
            parts.append(f"{self.pool.kernel}x{self.pool.kernel} max pool")
        elif self.pool:
            parts.append("2x2 mean pool")
        return " + ".join(parts)


def module_of(node: Node, root: nn.Module) -> nn.Module | None:
    """The module a node calls, or None."""
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def _activation(node: Node, value: Node, root: nn.Module) -> str | None:
    """The name of the activation that ``node`` applies to ``value``, if it is one we have."""
    if not node.args or node.args[0] is not value or any(value is a for a in node.kwargs.values()):
        return None
    module = module_of(node, root)
    if module is not None:
        name = _MODULES.get(type(module))
        if name is None or has_hooks(module) or len(node.args) != 1 or node.kwargs:
            return None
        slope = getattr(module, "negative_slope", 0.01)
        return name if slope == 0.01 and getattr(module, "approximate", "none") == "none" else None
    if node.op not in ("call_function", "call_method"):
        return None
    name = _FUNCTIONS.get(node.target)
    if name is None:
        return None
    given = dict(
        zip(("slope", "inplace") if name == "leaky_relu" else ("inplace",), node.args[1:], strict=False)
    )
    given.update(node.kwargs)
    given.pop("inplace", None)
    if name == "leaky_relu" and given.pop("slope", given.pop("negative_slope", 0.01)) != 0.01:
        return None
    if name == "gelu" and given.pop("approximate", "none") != "none":
        return None
    return None if given else name


_MEAN_SETTINGS = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
_MAX_SETTINGS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_POOLS = {
    nn.AvgPool2d: _MEAN_SETTINGS,
    F.avg_pool2d: _MEAN_SETTINGS,
    torch._C._nn.avg_pool2d: _MEAN_SETTINGS,
    nn.MaxPool2d: _MAX_SETTINGS,
    F.max_pool2d: _MAX_SETTINGS,
    torch.max_pool2d: _MAX_SETTINGS[:5],
}


def _pool(node: Node, value: Node, root: nn.Module) -> Pool:
    """The pooling of ``value`` that ``node`` does, if it is one we have."""
    if not node.args or node.args[0] is not value:
        return None
    module = module_of(node, root)
    kind: Any = node.target if module is None else type(module)
    names = _POOLS.get(kind)
    if names is None or (module is None and node.op != "call_function"):
        return None
    if module is None:
        given = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
    elif has_hooks(module) or len(node.args) != 1 or node.kwargs:
        return None
    else:
        given = {name: getattr(module, name) for name in names}
    if given.get("ceil_mode", False):
        return None
    kernel = _side(given.get("kernel_size"))
    stride, padding = _side(given.get("stride") or kernel), _side(given.get("padding", 0))
    if names is _MEAN_SETTINGS:
        halves = (kernel, stride, padding) == (2, 2, 0) and given.get("divisor_override") is None
        return 2 if halves else None
    if kernel is None or stride is None or padding is None or given.get("return_indices", False):
        return None
    plain = _side(given.get("dilation", 1)) == 1 and kernel**2 <= LARGEST_WINDOW
    return MaxPool(kernel, stride, padding) if plain else None


def _side(size: Any) -> int | None:
    """The one number of a size that is the same in height and width."""
    sides = set(size) if isinstance(size, tuple | list) else {size}
    (side,) = sides if len(sides) == 1 else (None,)
    return side if type(side) is int else None


def is_add(node: Node) -> bool:
    """Whether ``node`` adds two values and does nothing else."""
    plain = node.op in ("call_function", "call_method") and node.target in (*_ADD, *_ADD_IN_PLACE)
    return plain and len(node.args) == 2 and not node.kwargs and all(isinstance(a, Node) for a in node.args)


def _residual(node: Node, value: Node) -> Node | None:
    """What ``node`` adds to ``value``, if it is a tensor that stays as it is."""
    if not is_add(node) or node.args[0] is node.args[1]:
        return None
    if node.target in _ADD_IN_PLACE and node.args[0] is not value:
        return None
    other = node.args[1] if node.args[0] is value else node.args[0]
    return other if isinstance(other, Node) else None


def activates(node: Node, value: Node, root: nn.Module) -> bool:
    """Whether ``node`` is an activation of ``value`` that could be folded."""
    return _activation(node, value, root) is not None


def pools(node: Node, value: Node, root: nn.Module) -> bool:
    """Whether ``node`` is a pooling of ``value`` that could be folded."""
    return _pool(node, value, root) is not None


def follows(node: Node, value: Node, root: nn.Module) -> bool:
    """Whether ``node`` is something that could be folded into a batch norm whose output is ``value``."""
    return _residual(node, value) is not None or activates(node, value, root) or pools(node, value, root)


def find(bn: Node, root: nn.Module, images: bool) -> Chain:
    """The longest chain that starts at a batch norm's call; ``images`` says whether it takes 4D input."""
    chain = Chain(bn, bn)
    steps: list[Callable[[Node, Node], bool]] = []

    def add(node: Node, value: Node) -> bool:
        chain.residual = _residual(node, value)
        return chain.residual is not None

    def act(node: Node, value: Node) -> bool:
        chain.activation = _activation(node, value, root)
        return chain.activation is not None

    def pool(node: Node, value: Node) -> bool:
        chain.pool = _pool(node, value, root) if images else None
        return chain.pool is not None

    steps = [add, act, pool]
    while steps:
        if len(chain.last.users) != 1:
            chain.why_not_more = "its output is used in several places"
            break
        (node,) = chain.last.users
        if node.op == "output":
            chain.why_not_more = "its output leaves the module"
            break
        taken = next((i for i, step in enumerate(steps) if step(node, chain.last)), None)
        if taken is None:
            chain.why_not_more = f"followed by {describe(node, root)}"
            break
        steps = steps[taken + 1 :]
        chain.folded.append(node)
        chain.last = node
    return chain


def describe(node: Node, root: nn.Module) -> str:
    """A node in a few words, for a report."""
    module = module_of(node, root)
    if module is not None:
        return type(module).__name__
    return getattr(node.target, "__name__", str(node.target))


def _roots(node: Node, root: nn.Module) -> set[Node]:
    """The values whose memory ``node`` may share: all its inputs', unless it surely makes a new tensor."""
    found: set[Node] = set()
    waiting = [node]
    seen: set[Node] = set()
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        module = module_of(one, root)
        found.add(one)
        if module is None or not isinstance(module, _FRESH):
            waiting += one.all_input_nodes
    return found


def _changes(node: Node, root: nn.Module) -> bool:
    """Whether ``node`` may change the values it is given."""
    module = module_of(node, root)
    if module is not None:
        known = type(module).__module__.startswith("torch.nn.") and not list(module.children())
        return bool(getattr(module, "inplace", False)) or not (known or isinstance(module, _FRESH))
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if node.op == "call_function":
        asked = bool(node.kwargs.get("inplace")) or "out" in node.kwargs
        return asked or node.target in _IN_PLACE or str(getattr(node.target, "__name__", "")).endswith("_")
    return False


def moved_past_a_change(chain: Chain, graph: Graph, root: nn.Module) -> bool:
    """Whether an input of the chain may be changed before its last node, where the one call will stand."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    inputs = [(chain.first, node) for node in chain.first.all_input_nodes]
    if chain.residual is not None:
        adding = next(node for node in chain.folded if chain.residual in node.all_input_nodes)
        inputs.append((adding, chain.residual))
    for start, value in inputs:
        between = [node for node in graph.nodes if order[start] < order[node] < order[chain.last]]
        for node in between:
            if node in chain.folded or not _changes(node, root):
                continue
            touched = set().union(*(_roots(n, root) for n in node.all_input_nodes))
            if touched & _roots(value, root):
                return True
    return False


def rewrite(chain: Chain, graph: Graph) -> None:
    """Replace the chain by one call of the batch norm."""
    given = {"residual": chain.residual, "activation": chain.activation, "pool": chain.pool}
    kwargs: Any = {name: value for name, value in given.items() if value is not None}
    with graph.inserting_after(chain.last):
        fused = graph.call_module(str(chain.first.target), chain.first.args, kwargs)
    chain.last.replace_all_uses_with(fused)
    for node in reversed([chain.first, *chain.folded]):
        graph.erase_node(node)
