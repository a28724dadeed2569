"""Fuse what follows a batch norm into its call, one module's ``forward`` at a time; and the way back."""

import operator
from typing import NamedTuple

import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, Node
from torch.nn import Module

from ..epilogue import ACTIVATIONS, MaxPool
from ..graph.layers import BatchNormLayer, hooked
from ..graph.trace import NotAGraph, module_of, trace_always
from ..nn.layer import Fused
from .match import (
    activation_of,
    find_fusion,
    is_add,
    moves_past_a_change,
    pool_of,
    replace_by_one_call,
    what_follows,
)
from .rewrite import install


class Outcome(NamedTuple):
    """What happened to a layer: what was fused, the module whose ``forward`` was rewritten, why not more."""

    fused: str = ""
    where: str | None = None
    reason: str = ""


def fuse(root: Module) -> dict[Module, Outcome]:
    """Fuse in every module below ``root`` and in itself; the outcome for each batch norm found."""
    outcomes: dict[Module, Outcome] = {}
    for name, module in _forwards(root):
        try:
            found = _fuse_forward(module)
        except NotAGraph as why:
            reason = f"in {type(module).__name__}, {why}"
            found = {child: Outcome(reason=reason) for child in module.children() if isinstance(child, Fused)}
        for layer, outcome in found.items():
            if layer not in outcomes or (outcome.fused and not outcomes[layer].fused):
                outcomes[layer] = outcome._replace(where=name) if outcome.fused else outcome
    return outcomes


def _forwards(root: Module) -> list[tuple[str, Module]]:
    """The modules whose ``forward`` may call a batch norm, with their names."""
    modules = root.named_modules()
    return [(n, m) for n, m in modules if not isinstance(m, BatchNormLayer) and _holds_batch_norm(m)]


def _holds_batch_norm(module: Module) -> bool:
    return any(isinstance(m, Fused) for m in module.modules())


def _fuse_forward(module: Module) -> dict[Module, Outcome]:
    """Fuse in the code of one ``forward``: for each layer what was fused, and why not more.

    Raises:
        NotAGraph: its code cannot be seen as a graph.
    """
    graph = trace_always(module, set())
    through = _worth_looking_through(graph, module)
    if through:
        try:
            graph = trace_always(module, through)
        except NotAGraph:
            through = set()
    outcomes: dict[Module, Outcome] = {}
    guarded = {name for name, child in module.named_modules() if child in through}
    changed = False
    # From the end: of two batch norms that are added, the later is computed nearer to the addition.
    for node in reversed(list(graph.nodes)):
        layer = module_of(node, module)
        if not isinstance(layer, Fused):
            continue
        outcome = _fuse_call(node, layer, graph, module, guarded)
        changed = changed or bool(outcome.fused)
        if outcome.fused or layer not in outcomes:
            outcomes[layer] = outcome
    if changed:
        graph.lint()
        install(module, graph, guarded)
    return outcomes


def _fuse_call(node: Node, layer: Fused, graph: Graph, module: Module, guarded: set[str]) -> Outcome:
    """Fuse into one call of a batch norm: what was fused, and why not more.

    The paths of modules that do another's work, or none any more, are added to ``guarded``.
    """
    if _does_more(layer) or node.kwargs or len(node.args) != 1:
        return Outcome(reason="it computes what follows it already")
    if hooked(layer):
        return Outcome(reason="it has hooks, which see its output")
    fusion = find_fusion(node, module, isinstance(layer, nn.BatchNorm2d | nn.LazyBatchNorm2d))
    if not fusion.fused:
        return Outcome(reason=fusion.why_not_more)
    if moves_past_a_change(fusion, graph, module):
        return Outcome(reason="something between it and what follows may change its input")
    guarded |= {str(n.target) for n in (node, *fusion.fused) if n.op == "call_module"}
    replace_by_one_call(fusion, graph)
    return Outcome(str(fusion), reason=fusion.why_not_more)


def _worth_looking_through(graph: Graph, root: Module) -> set[Module]:
    """The children that end in a batch norm, or its activation, into which something could be fused here."""
    through: set[Module] = set()
    taken: set[Node] = set()
    for node in reversed(list(graph.nodes)):
        child = module_of(node, root)
        if child is None or isinstance(child, Fused) or len(node.users) != 1:
            continue
        (user,) = node.users
        if user.op == "output" or user in taken or not what_follows(user, node, root):
            continue
        added = user.all_input_nodes if is_add(user) else []
        if any(isinstance(module_of(a, root), Fused) and len(a.users) == 1 for a in added):
            continue
        inwards, activated = _ends_in_batch_norm(child)
        if inwards and (not activated or pool_of(user, node, root)):
            through |= set(inwards)
            taken.add(user)
    return through


def _ends_in_batch_norm(module: Module) -> tuple[list[Module], bool]:
    """The modules to look through, from this one inwards, to see the batch norm that computes its output.

    And whether an activation comes after that batch norm.
    """
    if hooked(module) or type(module).__call__ is not Module.__call__ or not _holds_batch_norm(module):
        return [], False
    try:
        graph = trace_always(module, set())
    except NotAGraph:
        return [], False
    (out,) = graph.find_nodes(op="output")
    last, activated = out.args[0], False
    if isinstance(last, Node) and last.args and isinstance(last.args[0], Node):
        activated = len(last.users) == 1 and activation_of(last, last.args[0], module) is not None
        last = last.args[0] if activated else last
    if not isinstance(last, Node) or len(last.users) != 1:
        return [], False
    child = module_of(last, module)
    if child is None:
        return [], False
    if isinstance(child, Fused):
        return [module], activated
    deeper, earlier = _ends_in_batch_norm(child)
    if not deeper or (activated and earlier):
        return [], False
    return [module, *deeper], activated or earlier


# --- the way back -----------------------------------------------------------------------------------------


def unfuse(root: Module) -> dict[Module, str]:
    """Write out what layers below ``root`` compute besides; why not, for those where it cannot be done."""
    kept: dict[Module, str] = {}
    seen: set[Module] = set()
    for _, module in _forwards(root):
        try:
            graph = trace_always(module, set())
        except NotAGraph as why:
            more = [child for child in module.children() if isinstance(child, Fused) and _does_more(child)]
            kept.update(dict.fromkeys(more, f"in {type(module).__name__}, {why}"))
            continue
        calls = [(node, layer) for node in graph.nodes if isinstance(layer := module_of(node, module), Fused)]
        seen.update(layer for _, layer in calls)
        written = [_write_out(node, layer, graph) for node, layer in calls]
        if any(written):
            graph.lint()
            install(module, graph)
    for layer in root.modules():
        if isinstance(layer, Fused) and _does_more(layer) and layer not in seen:
            kept.setdefault(layer, "it computes more than a batch norm, and no code that calls it was found")
    return kept


def _does_more(layer: Fused) -> bool:
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
