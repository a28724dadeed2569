"""Carry a plan out on a copy of the model: new weights, modules exchanged, single forwards rewritten."""

import copy
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx, nn

from ..graph.layers import hooked, replace_module
from ..graph.record import Call
from ..graph.trace import NotAGraph, trace
from .affine import Affine, NotExactError, fold_after, fold_before
from .find import Linear, Norm
from .layers import AffineTail, ChannelAffine, Tail
from .plan import Fold


@dataclass
class _Edit:
    """One change inside a forward: a call of a function goes, or gains a bias."""

    call: Call
    stand_in: nn.Module | None = None  # what takes the batch norm's place; None: its input does
    bias: str = ""  # the attribute that holds the new bias

    @property
    def index(self) -> int:
        """Which of the forward's calls of its function it is."""
        return [call for call in self.call.forward.calls if call.function is self.call.function].index(
            self.call
        )


def apply(model: nn.Module, folds: list[Fold], left: Iterable[Norm]) -> nn.Module:
    """Return a folded evaluation-mode copy of ``model``; raises ``NotExactError`` if a weight overflows."""
    folded = copy.deepcopy(model).eval()
    edits: dict[str, list[_Edit]] = {}
    _store_weights(folded, folds, edits)
    for fold in folds:
        for norm in fold.norms:
            keep = fold.affine if fold.how == "merged" and norm is fold.norms[-1] else None
            folded = _replace_norm(folded, norm, keep, edits)
    for norm in left:
        # One multiply-add takes its place; a batch norm with a tail is one pass already.
        if norm.kind == "module" and isinstance(norm.affine, Affine) and not norm.tail:
            old = folded.get_submodule(norm.path)
            if not hooked(old):
                folded = replace_module(folded, norm.path, _channel_affine(norm.affine, old))
    for path, wanted in edits.items():
        folded = replace_module(folded, path, _rewritten(folded.get_submodule(path), wanted))
    return folded


# Weights


def _store_weights(model: nn.Module, folds: list[Fold], edits: dict[str, list[_Edit]]) -> None:
    """Fold in float64, each fold upon the last, and round each weight and bias once."""
    exact: dict[Linear, tuple[Tensor, Tensor | None]] = {}
    for fold in folds:
        linear = fold.linear
        if linear is None:
            continue
        bias = None if linear.bias is None else _state(model, linear.bias.names[0])
        weight, bias = exact.get(linear, (_state(model, linear.weight.names[0]), bias))
        enter = fold_after if fold.how == "after" else fold_before
        exact[linear] = enter(linear.op, weight, bias, fold.affine)
    for linear, (weight, bias) in exact.items():
        _store(model, linear, weight, bias, edits)


def _state(model: nn.Module, name: str) -> Tensor:
    owner, _, attribute = name.rpartition(".")
    return cast(Tensor, getattr(model.get_submodule(owner), attribute))


def _store(
    model: nn.Module, linear: Linear, weight: Tensor, bias: Tensor | None, edits: dict[str, list[_Edit]]
) -> None:
    old = _state(model, linear.weight.names[0])
    _set_state(model, linear.weight.names, _rounded(weight, old, linear.path))
    if bias is None:
        return
    new = _rounded(bias, old, linear.path)
    if linear.bias is not None:
        _set_state(model, linear.bias.names, new)
        return
    forward = linear.call.forward
    module = model.get_submodule(forward.path)
    if "bias" in module._parameters and linear.weight.names[0].rpartition(".")[0] == forward.path:
        module.register_parameter("bias", new)
        return
    edit = _Edit(linear.call)
    edit.bias = f"_folded_bias_{linear.call.name}_{edit.index}"
    module.register_parameter(edit.bias, new)
    edits.setdefault(forward.path, []).append(edit)


def _rounded(exact: Tensor, like: Tensor, path: str) -> nn.Parameter:
    rounded = exact.to(like.dtype)
    if rounded.shape == like.shape:
        rounded = torch.empty_like(like.detach()).copy_(rounded)  # the layout the weight had
    if not bool(torch.isfinite(rounded).all()):
        raise NotExactError(
            f"the folded weight of {path} does not fit {str(like.dtype).removeprefix('torch.')}"
        )
    return nn.Parameter(rounded.detach(), requires_grad=like.requires_grad)


def _set_state(model: nn.Module, names: tuple[str, ...], tensor: nn.Parameter) -> None:
    for name in names:
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        if attribute in module._parameters:
            module._parameters[attribute] = tensor
        else:
            module._buffers[attribute] = tensor.detach()


# Modules


def _replace_norm(
    model: nn.Module, norm: Norm, keep: Affine | None, edits: dict[str, list[_Edit]]
) -> nn.Module:
    """Remove a norm, except its tail; ``keep``: the map that stays in its place."""
    old = model.get_submodule(norm.path)
    function = norm.kind == "function"
    affine = None if keep is None else _channel_affine(keep, old)
    stand_in: nn.Module | None = affine
    if norm.tail:
        settings = (
            norm.call.kwargs if function else {n: getattr(old, n, None) for n in ("activation", "pool")}
        )
        tail = Tail(settings.get("activation"), settings.get("pool"))
        stand_in = tail if affine is None else AffineTail(affine, tail)
    if function:
        edits.setdefault(norm.path, []).append(_Edit(norm.call, stand_in))
        return model
    return replace_module(model, norm.path, stand_in or nn.Identity())


def _channel_affine(affine: Affine, old: nn.Module) -> ChannelAffine:
    state = next((t for t in (*old.parameters(), *old.buffers()) if t.is_floating_point()), affine.scale)
    return ChannelAffine(affine, state.dtype, state.device)


# Forwards


def _rewritten(module: nn.Module, edits: list[_Edit]) -> fx.GraphModule:
    """Return ``module`` with the batch norms in its own forward taken out, and biases put in."""
    positional, named = edits[0].call.forward.given
    parameters = list(inspect.signature(module.forward).parameters.values())
    absent = {
        p.name: p.default
        for i, p in enumerate(parameters)
        if i >= positional and p.name not in named and p.default is not p.empty
    }
    try:
        graph = trace(module, lambda _: True, given=absent)
    except NotAGraph as error:
        name = type(module).__name__
        raise NotExactError(
            f"the forward of {name} calls it directly and torch.fx cannot trace that"
        ) from error
    nodes = [_node_of(graph, edit) for edit in edits]  # all of them before the first is erased
    for i, (node, edit) in enumerate(zip(nodes, edits, strict=True)):
        _edit(module, graph, node, edit, f"_folded_affine_{i}")
    made = fx.GraphModule(module, graph, type(module).__name__)
    made.graph.eliminate_dead_code()  # only a graph with a module knows which calls are pure
    made.graph.lint()
    made.recompile()
    return made


def _node_of(graph: fx.Graph, edit: _Edit) -> fx.Node:
    found: list[fx.Node] = list(graph.find_nodes(op="call_function", target=edit.call.function))
    if edit.index >= len(found):
        raise NotExactError("torch.fx shows another forward than the one that ran")
    return found[edit.index]


def _edit(module: nn.Module, graph: fx.Graph, node: fx.Node, edit: _Edit, name: str) -> None:
    if edit.bias:
        with graph.inserting_before(node):
            bias = graph.get_attr(edit.bias)
        node.args = (*node.args[:2], bias, *node.args[3:])
        node.kwargs = {key: value for key, value in node.kwargs.items() if key != "bias"}
        return
    source = node.args[0] if node.args else node.kwargs["input"]
    if edit.stand_in is not None:
        module.add_module(name, edit.stand_in)
        residual = node.kwargs.get("residual")
        with graph.inserting_before(node):
            source = graph.call_module(name, (source,) if residual is None else (source, residual))
    node.replace_all_uses_with(cast(fx.Node, source))
    graph.erase_node(node)
