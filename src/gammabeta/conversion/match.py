"""What may be fused into a batch norm's call: ``+ residual``, an activation, a 2x2 mean pool or max pooling.

Each only where it is the sole use of what comes before it, and where nothing in between can change an input.
"""

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, Node

from ..epilogue import Epilogue, MaxPool, Pool, activation_of_call, activation_of_module
from ..graph.layers import hooked
from ..graph.trace import IN_PLACE_OPERATORS, module_of
from ..kernels.backend import LARGEST_WINDOW

_ADD = (operator.add, torch.add, "add")
_ADD_IN_PLACE = (operator.iadd, "add_")
_IN_PLACE = {*IN_PLACE_OPERATORS, operator.setitem}
_FRESH = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm)


@dataclass
class Fusion:
    """A batch norm's call and what follows it, to become one call."""

    call: Node
    settings: dict[str, Any] = field(default_factory=dict)  # what the one call is asked for besides
    fused: list[Node] = field(default_factory=list)  # what follows, in order
    why_not_more: str = ""

    def __str__(self) -> str:
        parts = ["residual"] if "residual" in self.settings else []
        epilogue = str(Epilogue(self.settings.get("activation"), self.settings.get("pool")))
        return " + ".join([*parts, epilogue] if epilogue else parts)

    @property
    def last(self) -> Node:
        """The last of the calls, where the one call will stand."""
        return self.fused[-1] if self.fused else self.call


# --- patterns ---------------------------------------------------------------------------------------------


def _called_on(node: Node, value: Node, root: nn.Module) -> tuple[nn.Module | None, bool]:
    """The module that ``node`` calls, if any, and whether it does so on ``value`` alone, unwatched.

    Of a function or method only the first argument must be ``value``, and no keyword.
    """
    if not node.args or node.args[0] is not value or any(value is a for a in node.kwargs.values()):
        return None, False
    module = module_of(node, root)
    if module is None:
        return None, node.op in ("call_function", "call_method")
    return module, len(node.args) == 1 and not node.kwargs and not hooked(module)


def activation_of(node: Node, value: Node, root: nn.Module) -> str | None:
    """The name of the activation that ``node`` applies to ``value``, if the table has it."""
    module, plain = _called_on(node, value, root)
    if not plain:
        return None
    if module is not None:
        return activation_of_module(module)
    return activation_of_call(node.target, node.args[1:], node.kwargs)


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


def pool_of(node: Node, value: Node, root: nn.Module) -> Pool:
    """The pooling of ``value`` that ``node`` does, if it is one we have."""
    module, plain = _called_on(node, value, root)
    kind: Any = node.target if module is None else type(module)
    names = _POOLS.get(kind) if plain else None
    if names is None:
        return None
    if module is None:
        given = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
    else:
        given = {name: getattr(module, name) for name in names}
    kernel = _side(given.get("kernel_size"))
    stride, padding = _side(given.get("stride") or kernel), _side(given.get("padding", 0))
    if kernel is None or stride is None or padding is None or given.get("ceil_mode", False):
        return None
    if names is _MEAN_SETTINGS:
        halves = (kernel, stride, padding) == (2, 2, 0) and given.get("divisor_override") is None
        return 2 if halves else None
    dense = _side(given.get("dilation", 1)) == 1 and not given.get("return_indices", False)
    return MaxPool(kernel, stride, padding) if dense and kernel**2 <= LARGEST_WINDOW else None


def _side(size: Any) -> int | None:
    """The one number of a size that is the same in height and width."""
    sides = set(size) if isinstance(size, tuple | list) else {size}
    (side,) = sides if len(sides) == 1 else (None,)
    return side if type(side) is int else None


def is_add(node: Node) -> bool:
    """Whether ``node`` adds two values and does nothing else."""
    plain = node.op in ("call_function", "call_method") and node.target in (*_ADD, *_ADD_IN_PLACE)
    return plain and len(node.args) == 2 and not node.kwargs and all(isinstance(a, Node) for a in node.args)


def residual_of(node: Node, value: Node) -> Node | None:
    """What ``node`` adds to ``value``, if it is a tensor that stays as it is."""
    if not is_add(node) or node.args[0] is node.args[1]:
        return None
    if node.target in _ADD_IN_PLACE and node.args[0] is not value:
        return None
    other = node.args[1] if node.args[0] is value else node.args[0]
    return other if isinstance(other, Node) else None


def what_follows(node: Node, value: Node, root: nn.Module) -> dict[str, Any]:
    """What ``node`` does with ``value`` that could be fused into a batch norm, as the arguments for it."""
    found = {
        "residual": residual_of(node, value),
        "activation": activation_of(node, value, root),
        "pool": pool_of(node, value, root),
    }
    return {name: setting for name, setting in found.items() if setting is not None}


# --- a batch norm's call and what follows it --------------------------------------------------------------


def find_fusion(call: Node, root: nn.Module, images: bool) -> Fusion:
    """All that can become one call with a batch norm's; ``images`` says whether it takes 4D input."""
    found = Fusion(call)
    names = ["residual", "activation", "pool"]  # in the order in which they can follow
    while names:
        value = found.last
        if len(value.users) != 1:
            found.why_not_more = "its output is used in several places"
            break
        (node,) = value.users
        if node.op == "output":
            found.why_not_more = "its output leaves the module"
            break
        follows = what_follows(node, value, root)
        name = next((n for n in names if n in follows and (images or n != "pool")), None)
        if name is None:
            found.why_not_more = f"followed by {_described(node, root)}"
            break
        found.settings[name] = follows[name]
        found.fused.append(node)
        names = names[names.index(name) + 1 :]
    return found


def _described(node: Node, root: nn.Module) -> str:
    """A node in a few words, for a report."""
    module = module_of(node, root)
    if module is not None:
        return type(module).__name__
    return getattr(node.target, "__name__", str(node.target))


def replace_by_one_call(fusion: Fusion, graph: Graph) -> None:
    """Put one call of the batch norm where the last of the calls stands."""
    with graph.inserting_after(fusion.last):
        fused = graph.call_module(str(fusion.call.target), fusion.call.args, fusion.settings)
    fusion.last.replace_all_uses_with(fused)
    for node in reversed([fusion.call, *fusion.fused]):
        graph.erase_node(node)


# --- what may change in between ---------------------------------------------------------------------------


def moves_past_a_change(fusion: Fusion, graph: Graph, root: nn.Module) -> bool:
    """Whether one of its inputs may be changed before its last call, where the one call will stand."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    inputs = [(fusion.call, node) for node in fusion.call.all_input_nodes]
    residual = fusion.settings.get("residual")
    if residual is not None:
        inputs.append((next(node for node in fusion.fused if residual in node.all_input_nodes), residual))
    for start, value in inputs:
        for node in graph.nodes:
            between = order[start] < order[node] < order[fusion.last] and node not in fusion.fused
            if between and _changes(node, root):
                touched = set().union(*(_roots(n, root) for n in node.all_input_nodes))
                if touched & _roots(value, root):
                    return True
    return False


def _roots(node: Node, root: nn.Module) -> set[Node]:
    """The values whose memory ``node`` may share: all its inputs', unless it surely makes a new tensor."""
    found: set[Node] = set()
    waiting = [node]
    while waiting:
        one = waiting.pop()
        if one in found:
            continue
        found.add(one)
        if not isinstance(module_of(one, root), _FRESH):
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
