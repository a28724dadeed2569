"""Which convolutions of a model are followed by one batch normalization and by nothing else."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from .. import nn as gbnn
from .hooks import hooked
from .layers import BatchNormLayer
from .trace import NotAGraph, is_torch_layer, module_of, trace

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FROZEN = (gbnn.FrozenBatchNorm1d, gbnn.FrozenBatchNorm2d, gbnn.FrozenBatchNorm3d)

Pair = tuple[Any, BatchNormLayer]  # a plain convolution of torch's, and what follows it


def convolutions_before_batch_norm(model: nn.Module) -> list[Pair]:
    """Return the pairs of layers where all that a convolution gives goes into one batch normalization.

    Neither layer has a hook, and no parameter of the convolution is read elsewhere in the model. A model that
    ``torch.fx`` cannot trace has no pairs, because it is not known what follows what.
    """
    try:
        graph = trace(model, lambda m: isinstance(m, (*_CONVOLUTIONS, BatchNormLayer)) or is_torch_layer(m))
    except NotAGraph:
        return []
    modules: dict[fx.Node, Any] = {
        node: module for node in graph.nodes if (module := module_of(node, model)) is not None
    }
    used_elsewhere = {id(attribute) for attribute in _attributes(model, graph)}
    owners = Counter(id(tensor) for module in model.modules() for tensor in module._parameters.values())
    found = []
    for node, module in modules.items():
        if type(module) not in _CONVOLUTIONS or hooked(module) or len(node.users) != 1:
            continue
        own = [id(tensor) for tensor in module._parameters.values() if tensor is not None]
        alone = not used_elsewhere & {*own} and all(owners[name] == 1 for name in own)
        user = next(iter(node.users))
        once = list(modules.values()).count(module) == 1
        if alone and once and user in modules and _normalizes(modules[user], node, user):
            found.append((module, modules[user]))
    return found


def _attributes(model: nn.Module, graph: fx.Graph) -> Iterator[Any]:
    """What the model's code reads without calling the module that holds it."""
    for node in graph.nodes:
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            yield getattr(model.get_submodule(owner), name)


def _normalizes(module: nn.Module, source: fx.Node, user: fx.Node) -> bool:
    """Whether the module subtracts the mean of ``source``, its input (and not its residual, say)."""
    if not isinstance(module, BatchNormLayer) or isinstance(module, _FROZEN) or hooked(module):
        return False
    own_code = not type(module).__module__.startswith(("torch.nn.", "gammabeta.nn."))
    others = (*user.args[1:], *user.kwargs.values())
    return not own_code and user.args[:1] == (source,) and source not in others
