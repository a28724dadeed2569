"""Fold what follows a batch norm into its call, frame by frame."""

from torch import nn
from torch.fx import Graph, Node
from torch.nn import Module

from ..graph.trace import NotAGraph, has_hooks, trace
from ..nn.layer import Fused
from .match import activates, find, follows, is_add, module_of, moved_past_a_change, pools, rewrite
from .rewrite import install

# What happened to a layer: what was folded, the name of the module rewritten for it, why no more.
Outcome = tuple[str, str | None, str]


def fold_frames(root: Module) -> dict[Module, Outcome]:
    """Fold in every module below ``root`` and in itself; the outcome of each batch norm that was met."""
    outcomes: dict[Module, Outcome] = {}
    for name, module in list(root.named_modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or not _holds_batch_norm(module):
            continue
        try:
            found = _fold(module)
        except NotAGraph as why:
            found = {
                child: ("", None, f"in {type(module).__name__}, {why}")
                for child in module.children()
                if isinstance(child, Fused)
            }
        for layer, (text, reason) in ((k, (v[0], v[2])) for k, v in found.items()):
            if text and not outcomes.get(layer, ("",))[0]:
                outcomes[layer] = (text, name, reason)
            elif layer not in outcomes:
                outcomes[layer] = ("", None, reason)
    return outcomes


def _holds_batch_norm(module: Module) -> bool:
    return any(isinstance(m, Fused) for m in module.modules())


def _fold(module: Module) -> dict[Module, Outcome]:
    """Fold in the code of one module's ``forward``.

    Raises:
        NotAGraph: its code cannot be seen as a graph.
    """
    graph = trace(module, set())
    through = _worth_looking_through(graph, module)
    if through:
        try:
            graph = trace(module, through)
        except NotAGraph:
            through = set()
            graph = trace(module, through)
    outcomes: dict[Module, Outcome] = {}
    guarded = {name for name, child in module.named_modules() if child in through}
    changed = False
    # From the end: of two batch norms that are added, the later is computed nearer to the addition.
    for node in reversed(list(graph.nodes)):
        layer = module_of(node, module)
        if not isinstance(layer, Fused):
            continue
        text, reason = _fold_one(node, layer, graph, module, guarded)
        changed = changed or bool(text)
        if text or layer not in outcomes:
            outcomes[layer] = (text, None, reason)
    if changed:
        graph.lint()
        install(module, graph, guarded)
    return outcomes


def _fold_one(node: Node, layer: Fused, graph: Graph, module: Module, guarded: set[str]) -> tuple[str, str]:
    """Fold into one call of a batch norm: what was folded, and why no more.

    The paths of modules that do another's work, or none any more, are added to ``guarded``.
    """
    if layer.activation is not None or layer.pool is not None or node.kwargs or len(node.args) != 1:
        return "", "it computes what follows it already"
    if has_hooks(layer):
        return "", "it has hooks, which see its output"
    chain = find(node, module, isinstance(layer, nn.BatchNorm2d | nn.LazyBatchNorm2d))
    if not chain:
        return "", chain.why_not_more
    if moved_past_a_change(chain, graph, module):
        return "", "something between it and what follows may change its input"
    text = chain.text()
    guarded |= {str(n.target) for n in (node, *chain.folded) if n.op == "call_module"}
    rewrite(chain, graph)
    return text, chain.why_not_more


def _worth_looking_through(graph: Graph, root: Module) -> set[Module]:
    """The children that end in a batch norm, or its activation, and what follows here could be taken in."""
    through: set[Module] = set()
    taken: set[Node] = set()
    for node in reversed(list(graph.nodes)):
        child = module_of(node, root)
        if child is None or isinstance(child, Fused) or len(node.users) != 1:
            continue
        (user,) = node.users
        if user.op == "output" or user in taken or not follows(user, node, root):
            continue
        if is_add(user) and any(_is_batch_norm(a, root) for a in user.all_input_nodes):
            continue
        tail, activated = _tail(child)
        if tail and (not activated or pools(user, node, root)):
            through |= set(tail)
            taken.add(user)
    return through


def _is_batch_norm(node: Node, root: Module) -> bool:
    return isinstance(module_of(node, root), Fused) and len(node.users) == 1


def _tail(module: Module) -> tuple[list[Module], bool]:
    """The modules to look through, from this one inwards, to see the batch norm that computes its output.

    And whether an activation comes after that batch norm.
    """
    if has_hooks(module) or type(module).__call__ is not Module.__call__ or not _holds_batch_norm(module):
        return [], False
    try:
        graph = trace(module, set())
    except NotAGraph:
        return [], False
    (out,) = (node for node in graph.nodes if node.op == "output")
    last, activated = out.args[0], False
    if isinstance(last, Node) and last.args and isinstance(last.args[0], Node):
        activated = len(last.users) == 1 and activates(last, last.args[0], module)
        last = last.args[0] if activated else last
    if not isinstance(last, Node) or len(last.users) != 1:
        return [], False
    child = module_of(last, module)
    if child is None:
        return [], False
    if isinstance(child, Fused):
        return [module], activated
    deeper, earlier = _tail(child)
    if not deeper or (activated and earlier):
        return [], False
    return [module, *deeper], activated or earlier
