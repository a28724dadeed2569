"""Biases that batch normalization takes away again: their gradient is zero and need not be computed.

Batch normalization subtracts the mean over the batch, and with it whatever was added to a whole channel
before (Ioffe and Szegedy 2015, section 3.2). What a backward pass computes for such a bias is the rounding
error of a zero, at the cost of reading the largest gradients of a network once more.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn

from .. import nn as gbnn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FROZEN = (gbnn.FrozenBatchNorm1d, gbnn.FrozenBatchNorm2d, gbnn.FrozenBatchNorm3d)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Layers are not looked into."""
        return isinstance(m, (*_CONVOLUTIONS, nn.modules.batchnorm._BatchNorm)) or super().is_leaf_module(
            m, module_qualified_name
        )


def cancelled_biases(model: nn.Module) -> list[Tensor]:
    """Return the biases of convolutions whose output goes into one batch normalization and nowhere else.

    None of a model that ``torch.fx`` cannot trace, whose way through its layers is then not known.
    """
    try:
        graph = _Tracer().trace(model)
    except Exception:  # whatever a forward does that is not for tracing
        return []
    modules = {node: model.get_submodule(str(n)) for node in graph.nodes for n in _called(node)}
    used_elsewhere = {id(attribute) for attribute in _attributes(model, graph)}
    owners = Counter(id(tensor) for module in model.modules() for tensor in module._parameters.values())
    found = []
    for node, module in modules.items():
        bias = module.bias if type(module) in _CONVOLUTIONS else None
        once = list(modules.values()).count(module) == owners[id(bias)] == len(node.users) == 1
        if isinstance(bias, Tensor) and once and id(bias) not in used_elsewhere and not _hooked(module):
            user = next(iter(node.users))
            if user in modules and _normalizes(modules[user], node, user):
                found.append(bias)
    return found


def _called(node: fx.Node) -> list[Any]:
    return [node.target] if node.op == "call_module" else []


def _attributes(model: nn.Module, graph: fx.Graph) -> Iterator[Any]:
    """What the model's code reads without calling the module that holds it."""
    for node in graph.nodes:
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            yield getattr(model.get_submodule(owner), name)


def _normalizes(module: nn.Module, source: fx.Node, user: fx.Node) -> bool:
    """Whether the module subtracts the mean of ``source``, its input (and not its residual, say)."""
    if (
        not isinstance(module, nn.modules.batchnorm._BatchNorm)
        or isinstance(module, _FROZEN)
        or _hooked(module)
    ):
        return False
    own_code = not type(module).__module__.startswith(("torch.nn.", "gammabeta.nn."))
    others = (*user.args[1:], *user.kwargs.values())
    return not own_code and user.args[:1] == (source,) and source not in others


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


@contextmanager
def without_cancelled_biases(model: nn.Module) -> Iterator[None]:
    """Leave out the gradients of ``cancelled_biases`` for a while."""
    biases = [bias for bias in cancelled_biases(model) if bias.requires_grad]
    for bias in biases:
        bias.requires_grad_(False)
    try:
        yield
    finally:
        for bias in biases:
            bias.requires_grad_(True)
