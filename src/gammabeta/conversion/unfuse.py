"""The way back: what a batch norm of ours computes besides, as operations of their own again."""

import operator

import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, Node
from torch.nn import Module

from ..epilogue import ACTIVATIONS, MaxPool
from ..graph.trace import NotAGraph, trace
from ..nn.layer import Fused
from .match import module_of
from .rewrite import install


def unfold_frames(root: Module) -> dict[Module, str]:
    """Write out what layers below ``root`` compute besides; why not, for those where it cannot be done."""
    kept: dict[Module, str] = {}
    seen: set[Module] = set()
    for module in list(root.modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        children = [child for child in module.children() if isinstance(child, Fused)]
        if not any(isinstance(m, Fused) for m in module.modules()):
            continue
        try:
            graph = trace(module, set())
        except NotAGraph as why:
            kept.update({child: f"in {type(module).__name__}, {why}" for child in children if _more(child)})
            continue
        nodes = [(node, layer) for node in graph.nodes if isinstance(layer := module_of(node, module), Fused)]
        seen.update(layer for _, layer in nodes)
        written = [_write_out(node, layer, graph) for node, layer in nodes]
        if any(written):
            graph.lint()
            install(module, graph)
    for layer in root.modules():
        if isinstance(layer, Fused) and _more(layer) and layer not in seen:
            kept.setdefault(layer, "it computes more than a batch norm, and no code that calls it was found")
    return kept


def _more(layer: Fused) -> bool:
    return layer.activation is not None or layer.pool is not None


def _write_out(node: Node, layer: Fused, graph: Graph) -> bool:
    """Replace one call by a plain one and what came with it; False if it is a plain call."""
    given = {**dict(zip(("input", "residual"), node.args, strict=False)), **node.kwargs}
    residual = given.get("residual")
    activation = given.get("activation") or layer.activation
    pool = given.get("pool") or layer.pool
    if residual is None and activation is None and pool is None:
        return False
    with graph.inserting_before(node):
        last = graph.call_module(str(node.target), (given["input"],))
        if residual is not None:
            last = graph.call_function(operator.add, (last, residual))
        if activation is not None:
            last = graph.call_function(ACTIVATIONS[str(activation)].function, (last,))
        if isinstance(pool, MaxPool):
            last = graph.call_function(F.max_pool2d, (last, *pool))
        elif pool is not None:
            last = graph.call_function(F.avg_pool2d, (last, pool))
    node.replace_all_uses_with(last)
    graph.erase_node(node)
    return True
