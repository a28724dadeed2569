"""A module's ``forward`` as a graph of the calls it makes, run once on symbols by ``torch.fx``.

A graph shows one path. What decides on other paths (a value, an argument that is None, a type) is not in it.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.fx import Graph, Node, Tracer
from torch.nn import Conv1d, Conv2d, Conv3d, Module

from .. import nn as gbnn
from .layers import BatchNormLayer, hooked

Leaf = Callable[[Module], bool]


class NotAGraph(Exception):  # noqa: N818 - not an error: a finding
    """Why a module's ``forward`` cannot be written as a graph."""


# --- the tracer -------------------------------------------------------------------------------------------


class _Tracer(Tracer):
    def __init__(self, leaf: Leaf) -> None:
        super().__init__()
        self.leaf = leaf

    def is_leaf_module(self, m: Module, module_qualified_name: str) -> bool:
        """Whether the call of ``m`` is one node."""
        return self.leaf(m)


def is_torch_layer(module: Module) -> bool:
    """Whether the module is one of torch's own, and no ``Sequential``: what torch.fx does not look into."""
    return Tracer().is_leaf_module(module, "")


def trace(module: Module, leaf: Leaf, given: dict[str, Any] | None = None) -> Graph:
    """The graph of ``module.forward``, in which each call of a ``leaf`` module is one node.

    Args:
        module: it is called with symbols, in the mode it is in.
        leaf: which modules are not looked into.
        given: arguments of ``forward`` that are these values and not symbols.

    Raises:
        NotAGraph: ``forward`` does what symbols cannot.
    """
    try:
        return _Tracer(leaf).trace(module, concrete_args=given or None)
    except Exception as error:  # the user's code may do anything with a symbol in place of a value
        text = str(error).strip().splitlines()
        raise NotAGraph(f"its forward cannot be traced ({text[0] if text else error!r})") from error


def module_of(node: Node, root: Module) -> Module | None:
    """The module of ``root`` that a node of its graph calls, or None."""
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


# --- a convolution and the batch norm behind it -----------------------------------------------------------

_CONVOLUTIONS = (Conv1d, Conv2d, Conv3d)
_FROZEN = (gbnn.FrozenBatchNorm1d, gbnn.FrozenBatchNorm2d, gbnn.FrozenBatchNorm3d)

Pair = tuple[Any, BatchNormLayer]  # a plain convolution of torch's, and what follows it


def convolutions_before_batch_norm(model: Module) -> list[Pair]:
    """Return the pairs of layers where all that a convolution gives goes into one batch normalization.

    Neither layer has a hook, and no parameter of the convolution is read elsewhere in the model. None of a
    model that ``torch.fx`` cannot trace, whose way through its layers is then not known.
    """
    try:
        graph = trace(model, lambda m: isinstance(m, (*_CONVOLUTIONS, BatchNormLayer)) or is_torch_layer(m))
    except NotAGraph:
        return []
    modules: dict[Node, Any] = {
        node: module for node in graph.nodes if (module := module_of(node, model)) is not None
    }
    read_alone = set()  # what the model's code reads without calling the module that holds it
    for node in graph.find_nodes(op="get_attr"):
        owner, _, name = str(node.target).rpartition(".")
        read_alone.add(id(getattr(model.get_submodule(owner), name)))
    owners = Counter(id(tensor) for module in model.modules() for tensor in module._parameters.values())
    called = Counter(modules.values())
    found = []
    for node, module in modules.items():
        if type(module) not in _CONVOLUTIONS or hooked(module) or len(node.users) != 1:
            continue
        own = [id(tensor) for tensor in module._parameters.values() if tensor is not None]
        alone = called[module] == 1 and all(owners[name] == 1 and name not in read_alone for name in own)
        user = next(iter(node.users))
        if alone and user in modules and _normalizes(modules[user], node, user):
            found.append((module, modules[user]))
    return found


def _normalizes(module: Module, source: Node, user: Node) -> bool:
    """Whether the module subtracts the mean of ``source``, its input (and not its residual, say)."""
    if not isinstance(module, BatchNormLayer) or isinstance(module, _FROZEN) or hooked(module):
        return False
    own_code = not type(module).__module__.startswith(("torch.nn.", "gammabeta.nn."))
    others = (*user.args[1:], *user.kwargs.values())
    return not own_code and user.args[:1] == (source,) and source not in others
